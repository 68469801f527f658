"""A DeBERTa measured on real text before and after patching: what `python -m deberta_kernels demo` runs."""
