"""Attention problems drawn, their errors measured against float64, and every backend held to the error budget.

Nothing here needs pytest, so that benchmarks use the same inputs and the same budget as the tests.
"""
