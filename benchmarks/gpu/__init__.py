"""Prove and time the GPU kernels on the device at hand; `bench_gpu.py` runs it all."""
