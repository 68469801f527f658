"""Hugging Face's DeBERTa models, patched to run fused attention; and modules that users build."""

from deberta_kernels.models import adapterhub, dense, fused  # which register the classes that they fuse

__all__ = ["adapterhub", "dense", "fused"]
