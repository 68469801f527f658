"""The Triton kernels, and what they are made of."""
