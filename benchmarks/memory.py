"""Measure memory alone: long documents and the largest model, or training of every released size.

python -m benchmarks memory               beyond the weights, and how it grows with the length; 10 minutes
python -m benchmarks memory --training    what training takes, the tables of docs/training.md; 20 minutes
"""

from __future__ import annotations

from benchmarks.harness import record, tables
from benchmarks.harness.record import Run
from benchmarks.model.peaks import measure_large
from benchmarks.training.memory import measure_training, section


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer of ours, or with --strict for a missed figure."""
    parser = record.options("memory", __doc__)
    parser.add_argument("--training", action="store_true", help="of training, the tables of docs/training.md")
    options = parser.parse_args(arguments)
    if options.training:
        run = Run("training_memory", options)
        measure_training(run)
        print(section(run.result))
        return run.status
    run = Run("memory", options, model="v3-base, random weights")
    run.measure_rates()
    measure_large(run)
    print(tables.text(run.result))
    return run.status
