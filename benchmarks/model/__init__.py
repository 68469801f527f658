"""Whole models and their rivals."""
