"""Rank passages for a query with a CrossEncoder: python examples/rerank.py --query TEXT --file FILE."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from comparing import add_texts, in_batches, load_model, main, package, patch_and_run, texts, write
from parts.task import InputError

MODEL = "mixedbread-ai/mxbai-rerank-xsmall-v1"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Rank passages for one or more queries with a DeBERTa CrossEncoder.")
    add_texts(parser, "passages", kind="a CrossEncoder", model=MODEL)
    parser.add_argument(
        "--query", action="append", required=True, help="what is looked for; may be given several times"
    )
    parser.add_argument("--top", type=int, default=5, help="passages to show of each query (default: 5)")
    parser.add_argument("--length", type=int, default=512, help="longest pair, in tokens")
    return parser.parse_args(arguments)


def difference(stock: list[float], patched: list[float]) -> str:
    """Return the largest difference of two lists of scores, and how many ranks changed."""
    largest = max(abs(x - y) for x, y in zip(stock, patched))
    orders = [sorted(range(len(scores)), key=lambda i: -scores[i]) for scores in (stock, patched)]
    moved = sum(x != y for x, y in zip(*orders))
    return f"largest difference of a score {largest:.1e}; {moved} of {len(stock)} ranks changed"


def run(arguments: list[str] | None = None) -> None:
    """Rank the passages for each query."""
    options = parse(arguments)
    passages = texts(options)
    if options.top < 1:
        raise InputError(f"--top must be at least 1, got {options.top}.")
    library = package("sentence_transformers", "sentence-transformers")
    model: Any = load_model(
        options.model, lambda: library.CrossEncoder(options.model, device=options.device, max_length=options.length)
    )
    if (labels := model.config.num_labels) != 1:
        raise InputError(
            f"--model {options.model} gives {labels} scores for a pair, a ranking needs one; it is a classifier."
        )
    pairs = [(query, passage) for query in options.query for passage in passages]
    # Of like length in a batch, as `predict` would have them: the stock model computes padding too.
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][1]))

    def score() -> list[float]:
        found = in_batches(
            [pairs[i] for i in order],
            options.batch_size,
            "pairs",
            lambda some: model.predict(some, batch_size=options.batch_size, show_progress_bar=False).tolist(),
        )
        return [x for _, x in sorted(zip(order, found))]

    scores = patch_and_run(model, options, score, difference)
    results = []
    for number, query in enumerate(options.query):
        of_query = scores[number * len(passages) : (number + 1) * len(passages)]
        ranked = sorted(range(len(passages)), key=lambda i: -of_query[i])[: options.top]
        results += [
            {"query": query, "rank": rank, "score": of_query[i], "passage": passages[i]}
            for rank, i in enumerate(ranked, 1)
        ]
    write(options.output, results, _line)


def _line(result: dict[str, Any]) -> str:
    header = f"{result['query']}\n" if result["rank"] == 1 else ""
    return f"{header}  {result['rank']}  {result['score']:.4f}  {result['passage']}"


if __name__ == "__main__":
    sys.exit(main(run))
