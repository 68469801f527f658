"""The attention core and the linear layers."""
