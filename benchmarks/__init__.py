"""Measurements of this package; `python -m benchmarks --help` lists them."""
