"""A machine that executes the PTX of GPU kernels on the CPU; see README.md."""
