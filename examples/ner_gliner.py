"""Find entities of any kind with GLiNER: python examples/ner_gliner.py --labels person,city TEXT."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from comparing import add_texts, in_batches, load_model, main, package, patch_and_run, texts, write
from parts.task import InputError

MODEL = "urchade/gliner_small-v2.1"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Find entities of kinds that you name, with a GLiNER on DeBERTa.")
    add_texts(parser, "texts", kind="a GLiNER model", model=MODEL)
    parser.add_argument("--labels", required=True, help="the kinds of entities, with commas between them")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score of an entity (default: 0.5)")
    return parser.parse_args(arguments)


def difference(stock: list[Any], patched: list[Any]) -> str:
    """Return the largest difference of a score, and how many entities only one of the two has."""
    largest, single, count = 0.0, 0, 0
    for one, other in zip(stock, patched):
        scores = [{(x["start"], x["end"], x["label"]): x["score"] for x in found} for found in (one, other)]
        both = scores[0].keys() & scores[1].keys()
        largest = max([largest, *(abs(scores[0][key] - scores[1][key]) for key in both)])
        single += len(scores[0].keys() ^ scores[1].keys())
        count += len(scores[0])
    return f"largest difference of a score {largest:.1e}; {single} of {count} entities found by only one of the two"


def run(arguments: list[str] | None = None) -> None:
    """Find the entities."""
    options = parse(arguments)
    labels = [label.strip() for label in options.labels.split(",") if label.strip()]
    if not labels:
        raise InputError(f"--labels must name at least one kind of entity, got {options.labels!r}.")
    if not 0 <= options.threshold <= 1:
        raise InputError(f"--threshold must be between 0 and 1, got {options.threshold}.")
    given = texts(options)
    library = package("gliner", "gliner")
    model: Any = load_model(
        options.model, lambda: library.GLiNER.from_pretrained(options.model, map_location=options.device)
    )
    model.eval()

    def find() -> list[Any]:
        return in_batches(
            given,
            options.batch_size,
            "texts",
            lambda some: model.inference(
                list(some), labels, threshold=options.threshold, batch_size=options.batch_size
            ),
        )

    found = patch_and_run(model, options, find, difference)
    kept = ("start", "end", "text", "label", "score")
    results = [
        {"text": text, "entities": [{name: entity[name] for name in kept} for entity in entities]}
        for text, entities in zip(given, found)
    ]
    write(options.output, results, lambda x: "\n".join([x["text"], *(_line(entity) for entity in x["entities"])]))


def _line(entity: dict[str, Any]) -> str:
    return f"  {entity['label']}  {entity['score']:.3f}  {entity['text']}"


if __name__ == "__main__":
    sys.exit(main(run))
