"""Draw attention problems, measure their errors against float64 and hold every backend to the error budget.

Nothing here needs pytest, so that benchmarks use the same inputs and the same budget as the tests.
"""
