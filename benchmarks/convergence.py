"""Fine-tune a checkpoint on sentence polarity with several seeds, patched and stock, and compare the accuracies.

python benchmarks/convergence.py --model DIRECTORY --data sentence_polarity.zip        10 seeds, hours on one core

The archive holds rt-polarity.pos and rt-polarity.neg, one sentence a line (Pang and Lee). Both models of a seed see the
same sentences in the same order; their dropout differs, as it would between two seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

import deberta_kernels as dk

HELD_OUT = 1000  # sentences
# Student's t at 5 % one-sided, by degrees of freedom, for the two one-sided tests.
T_95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}


def read(archive: Path) -> list[tuple[str, int]]:
    """Return (sentence, 1 for positive) in a fixed random order."""
    found = []
    with zipfile.ZipFile(archive) as file:
        for name in sorted(file.namelist()):
            if name.endswith((".pos", ".neg")):
                lines = file.read(name).decode("latin-1").splitlines()
                found += [(line.strip(), int(name.endswith(".pos"))) for line in lines if line.strip()]
    random.Random(0).shuffle(found)
    return found


def collate(tokenizer: Any, samples: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    """Return a padded batch."""
    texts = [text for text, _ in samples]
    batch = dict(tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))
    return {**batch, "labels": torch.tensor([label for _, label in samples])}


def accuracy(
    options: argparse.Namespace, tokenizer: Any, samples: list[tuple[str, int]], seed: int, ours: bool
) -> float:
    """Fine-tune one model and return its accuracy on the held-out sentences."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=2, dtype=torch.float32, local_files_only=True, ignore_mismatched_sizes=True
    ).train()
    # The same new head for both: a loader may draw other random numbers before it.
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.classifier.weight, std=0.02)
    torch.nn.init.zeros_(model.classifier.bias)
    if ours:
        dk.patch(model, strict=True)
    held_out, training = samples[:HELD_OUT], samples[HELD_OUT:]
    order = random.Random(seed).sample(range(len(training)), options.steps * options.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, fused=True)
    warm_up = max(options.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (options.steps - step) / (options.steps - warm_up + 1))
    )
    for step in range(options.steps):
        chosen = order[step * options.batch_size : (step + 1) * options.batch_size]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            loss = model(**collate(tokenizer, [training[index] for index in chosen])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(held_out), 50):
            batch = collate(tokenizer, held_out[start : start + 50])
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(held_out)


def verdict(ours: list[float], stock: list[float]) -> dict[str, Any]:
    """Compare: is the mean difference within half a deviation of the stock model's seeds, by two one-sided tests?"""
    differences = [a - b for a, b in zip(ours, stock)]
    bound = 0.5 * statistics.stdev(stock)
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    t = T_95.get(len(differences) - 1, 1.833)
    return {
        "patched": ours, "stock": stock, "mean_difference": mean, "bound": bound, "standard_error": error,
        "within": abs(mean) <= bound, "equivalent_at_5_percent": abs(mean) + t * error <= bound,
    }  # fmt: skip


def main() -> int:
    """Run; return 1 when the mean difference is over the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a checkpoint with its tokenizer")
    parser.add_argument("--data", required=True, type=Path, help="sentence_polarity.zip")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--bfloat16", action="store_true", help="train under bfloat16 autocast")
    options = parser.parse_args()
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    tokenizer, samples = AutoTokenizer.from_pretrained(options.model), read(options.data)
    found: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(options.seeds):
        for ours in (True, False):
            found[ours].append(accuracy(options, tokenizer, samples, seed, ours))
        print(f"seed {seed}: patched {found[True][-1]:.4f}, stock {found[False][-1]:.4f}", file=sys.stderr, flush=True)
    if options.seeds < 2:
        return 0
    result = verdict(found[True], found[False])
    print(json.dumps(result, indent=1))
    return int(not result["within"])


if __name__ == "__main__":
    sys.exit(main())
