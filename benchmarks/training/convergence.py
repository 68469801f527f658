"""Fine-tune a checkpoint on sentence polarity with several seeds, patched and stock, and compare the accuracies.

python -m benchmarks convergence --model DIRECTORY --data sentence_polarity.zip        10 seeds, an hour on one thread

The archive holds rt-polarity.pos and rt-polarity.neg, one sentence a line (Pang and Lee). Both models of a seed see the
same sentences in the same order; their dropout differs, as it would between two seeds. The word embeddings, most of the
parameters of a small model, are no part of what is compared and stay frozen.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import statistics
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import deberta_kernels as dk
from benchmarks.harness import record, tables
from benchmarks.harness.arguments import existing_file, existing_folder
from benchmarks.harness.process import note
from benchmarks.harness.record import Progress, Run

HELD_OUT = 1000  # sentences
POOL = 8  # batches whose sentences are sorted by length
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


def draw_batches(
    samples: list[tuple[str, int]], count: int, size: int, generator: random.Random
) -> list[list[tuple[str, int]]]:
    """Draw batches of sentences of similar length, in random order: half of a random batch would be padding."""
    chosen = generator.sample(samples, count * size)
    batches = []
    for start in range(0, len(chosen), POOL * size):
        pool = sorted(chosen[start : start + POOL * size], key=_length)
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    generator.shuffle(batches)
    return batches


def _length(sample: tuple[str, int]) -> int:
    return len(sample[0])


def accuracy(options: argparse.Namespace, seed: int, ours: bool) -> float:
    """Fine-tune one model and return its accuracy on the held-out sentences."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    tokenizer, samples = AutoTokenizer.from_pretrained(options.model), read(options.data)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=2, dtype=torch.float32, local_files_only=True, ignore_mismatched_sizes=True
    ).train()
    # The same new head for both: a loader may draw other random numbers before it.
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.classifier.weight, std=0.02)
    torch.nn.init.zeros_(model.classifier.bias)
    model.get_input_embeddings().requires_grad_(False)
    if ours:
        dk.patch(model, strict=True)
    held_out, training = samples[:HELD_OUT], samples[HELD_OUT:]
    batches = draw_batches(training, options.steps, options.batch_size, random.Random(seed))
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, fused=True)
    warm_up = max(options.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (options.steps - step) / (options.steps - warm_up + 1))
    )
    progress, every = Progress(1.0 for _ in batches), max(1, len(batches) // 10)
    for number, chosen in enumerate(batches, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            loss = model(**collate(tokenizer, chosen)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        left = progress.step()
        if number % every == 0:
            name = "patched" if ours else "stock"
            note(f"seed {seed}, {name}: step {number} of {len(batches)}, {left} left of it")
    model.eval()
    right = 0
    held_out = sorted(held_out, key=_length)
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


def main(arguments: list[str] | None = None) -> int:
    """Run; return 1 when the mean difference is over the bound."""
    parser = record.options("convergence", __doc__, strict=False, backend=False)
    parser.add_argument(
        "--model", required=True, type=existing_folder, help="directory of a checkpoint with its tokenizer"
    )
    parser.add_argument("--data", required=True, type=existing_file, help="sentence_polarity.zip")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=0, help="of each model; default 100, with --quick 10")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--jobs", type=int, default=1, help="models trained side by side, on as many threads each")
    parser.add_argument("--bfloat16", action="store_true", help="train under bfloat16 autocast")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (10 if options.quick else 100)
    learning = ("seeds", "steps", "batch_size", "learning_rate", "bfloat16")
    run = Run("convergence", options, **{name: getattr(options, name) for name in learning})
    found: dict[bool, list[float]] = {True: [], False: []}
    context = multiprocessing.get_context("spawn")
    progress = Progress(1.0 for _ in range(options.seeds))
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        waiting = [
            {ours: pool.submit(accuracy, options, seed, ours) for ours in found} for seed in range(options.seeds)
        ]
        for seed, both in enumerate(waiting):
            for ours in found:
                found[ours].append(both[ours].result())
            progress.step(f"seed {seed}: patched {found[True][-1]:.4f}, stock {found[False][-1]:.4f}")
    if options.seeds < 2:
        return 0
    run.keep(accuracy=verdict(found[True], found[False]))
    print(tables.text(run.result))
    return int(not run.result["accuracy"]["within"])
