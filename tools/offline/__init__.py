"""Compile every Triton kernel for devices that are not here, and count what the compilers made of it."""
