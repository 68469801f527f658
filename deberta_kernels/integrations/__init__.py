"""Adapt the models of other packages, reversibly; nothing here imports them before it is asked to."""
