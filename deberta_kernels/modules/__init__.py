"""Modules with Hugging Face's parameter names that compute attention through the kernels."""
