"""The backends, one module each; none imports another. `common` and `gpu_tables` have what several of them ask."""
