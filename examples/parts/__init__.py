"""What the training examples share: options, data, labels, the training loop, metrics, results."""
