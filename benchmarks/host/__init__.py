"""What a patched model does beside its kernels."""
