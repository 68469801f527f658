"""What is right: the error budget with its yardstick, and the self-test of a device that nobody has measured."""
