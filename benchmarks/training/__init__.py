"""Training steps, adapters, convergence, memory of training."""
