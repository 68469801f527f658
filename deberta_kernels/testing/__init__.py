"""Attention problems drawn, and every backend held to the error budget of `proof`.

Nothing here needs pytest, so that benchmarks use the same inputs and the same budget as the tests.
"""

from deberta_kernels.proof import budget, eager

__all__ = ["budget", "eager"]
