"""The GPU kernels on the device at hand: proved, then timed; `run.py` runs it all."""
