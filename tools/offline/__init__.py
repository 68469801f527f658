"""Every Triton kernel compiled for devices that are not here, and what the compilers made of it counted."""
