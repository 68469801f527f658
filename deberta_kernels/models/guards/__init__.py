"""What must hold before the kernels may stand in for original code, and what a layer may be handed."""
