"""Modules that users build themselves."""
