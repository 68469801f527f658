"""What PyTorch and its modules are up to: replaced code, hooks, tracing. Only these rooms read private state of torch."""
