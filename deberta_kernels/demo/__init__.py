"""Measure a DeBERTa on real text before and after patching: what `python -m deberta_kernels demo` runs."""
