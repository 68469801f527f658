"""Real texts: what a user gets, in tokens per second."""
