"""The checks of what callers pass, and their messages."""
