"""What PyTorch and its modules are up to: replaced code, hooks, tracing; the only rooms that read its private state."""
