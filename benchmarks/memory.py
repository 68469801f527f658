"""Measure memory alone: long documents and the largest model, or training of every released size.

python -m benchmarks memory               beyond the weights, and how it grows with the length; 10 minutes
python -m benchmarks memory --training    what fits of the tables of docs/training.md, and write them; 20 minutes
python -m benchmarks memory --training --no-measure    measure nothing that was not measured before, 2 minutes
"""

from __future__ import annotations

from benchmarks.harness import record, tables
from benchmarks.harness.record import Run
from benchmarks.model.peaks import measure_large
from benchmarks.training.memory import write_table


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer of ours, or with --strict for a missed figure."""
    parser = record.options("memory", __doc__)
    parser.add_argument("--training", action="store_true", help="write the tables of docs/training.md")
    parser.add_argument("--no-measure", action="store_true", help="with --training: compute only")
    options = parser.parse_args(arguments)
    if options.training:
        write_table(0 if options.no_measure else options.threads)
        return 0
    run = Run("memory", options, model="v3-base, random weights")
    run.measure_rates()
    measure_large(run)
    print(tables.text(run.result))
    return run.status
