"""Classify texts by labels of your own, without training: python examples/zero_shot.py --labels sport,politics TEXT."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from comparing import add_texts, in_batches, load_model, main, package, patch_and_run, texts, write
from parts.task import InputError

MODEL = "MoritzLaurer/deberta-v3-base-zeroshot-v2.0"
HYPOTHESIS = "This text is about {}."


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Classify texts by labels of your own with a DeBERTa trained on NLI.")
    add_texts(parser, "texts", kind="an NLI model", model=MODEL)
    parser.add_argument("--labels", required=True, help="the classes, with commas between them")
    parser.add_argument(
        "--hypothesis", default=HYPOTHESIS, help=f"sentence with {{}} for a label (default: {HYPOTHESIS})"
    )
    parser.add_argument("--multi-label", action="store_true", help="a text may have several labels, or none")
    return parser.parse_args(arguments)


def difference(stock: list[Any], patched: list[Any]) -> str:
    """Return the largest difference of a score, and how many texts have another first label."""
    largest = 0.0
    for one, other in zip(stock, patched):
        scores = dict(zip(other["labels"], other["scores"]))
        largest = max(largest, *(abs(score - scores[label]) for label, score in zip(one["labels"], one["scores"])))
    changed = sum(x["labels"][0] != y["labels"][0] for x, y in zip(stock, patched))
    return f"largest difference of a score {largest:.1e}; {changed} of {len(stock)} texts have another label"


def run(arguments: list[str] | None = None) -> None:
    """Classify the texts."""
    options = parse(arguments)
    labels = [label.strip() for label in options.labels.split(",") if label.strip()]
    if len(labels) < 2 and not options.multi_label:
        raise InputError(f"--labels must have two or more, got {options.labels!r}; one alone needs --multi-label.")
    if "{}" not in options.hypothesis:
        raise InputError(f"--hypothesis must hold {{}} where the label goes, got {options.hypothesis!r}.")
    given = texts(options)
    library = package("transformers", "transformers")
    pipe = load_model(
        options.model,
        lambda: library.pipeline("zero-shot-classification", model=options.model, device=options.device),
    )
    if pipe.entailment_id == -1:
        names = ", ".join(map(str, pipe.model.config.id2label.values()))
        raise InputError(
            f"--model {options.model} has no label that begins with entail, it has {names}; take an NLI model."
        )

    def classify() -> list[Any]:
        def some(part: Any) -> Any:
            return pipe(
                list(part),
                candidate_labels=labels,
                hypothesis_template=options.hypothesis,
                multi_label=options.multi_label,
                batch_size=options.batch_size,
            )

        return in_batches(given, options.batch_size, "texts", some)

    found = patch_and_run(pipe.model, options, classify, difference)
    results = [{"text": x["sequence"], "labels": x["labels"], "scores": x["scores"]} for x in found]
    write(options.output, results, lambda x: f"{x['labels'][0]}  {x['scores'][0]:.3f}  {x['text']}")


if __name__ == "__main__":
    sys.exit(main(run))
