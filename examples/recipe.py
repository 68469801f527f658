"""What the examples share: options, data, vocabulary, the training loop, and the comparison with the stock model."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measures import Memory
from torch import Tensor, nn
from vocabulary import PAD, Encoder, checkpoint_encoder, train_encoder

import deberta_kernels as dk
from deberta_kernels.testing import geometries

__all__ = ["IGNORED", "Record", "Task", "pad", "run"]

Record = dict[str, Any]
IGNORED = -100  # label of what has none
HELD_OUT = 10  # one record of so many is for the metric
COMPARED_STEPS = 8  # of the stock model
SKIPPED_STEPS = 2  # at the start, not timed


@dataclass
class Task:
    """What an example trains.

    Attributes:
        title: one line for --help.
        head: name of the class in transformers.
        default_records: makes records where no data is given.
        columns: names of the values a record has, for --help.
        texts: the texts of a record, from which a vocabulary is trained.
        encode: record, encoder, longest -> features, nested lists of int: "input_ids" and labels of any name.
        settings: records -> what else the model's configuration needs.
        precision: what --precision is by default.
        prepare: changes a padded batch before each step, given a generator.
        wrap: puts a module around the model.
        right: batch, model output -> (answers that are right, answers).
    """

    title: str
    head: str
    default_records: Callable[[], list[Record]]
    columns: str
    texts: Callable[[Record], Iterable[str]]
    encode: Callable[[Record, Encoder, int], Record | None]
    settings: Callable[[list[Record]], dict[str, Any]] = lambda records: {}
    precision: str = "float32"
    prepare: Callable[[dict[str, Tensor], Encoder, torch.Generator], dict[str, Tensor]] = lambda batch, *_: batch
    wrap: Callable[[Any], Any] = lambda model: model
    right: Callable[[dict[str, Tensor], Any], tuple[int, int]] = field(default_factory=lambda: _right_labels)


def _right_labels(batch: dict[str, Tensor], output: Any) -> tuple[int, int]:
    labels = batch["labels"]
    wanted = labels != IGNORED
    return int(((output.logits.argmax(-1) == labels) & wanted).sum()), int(wanted.sum())


def parse(task: Task, arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=task.title)
    parser.add_argument("--model", help="hub id or directory; default: a small model and a vocabulary trained now")
    parser.add_argument(
        "--data", help=f"JSON lines, a CSV or TSV file, or id[:configuration[:split]] of a data set; {task.columns}"
    )
    parser.add_argument("--no-patch", action="store_true", help="train the stock model")
    parser.add_argument("--no-comparison", action="store_true", help="do not run the stock model afterwards")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default=task.precision)
    parser.add_argument("--checkpointing", action="store_true", help="compute layers again in the backward")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="longest sequence, in tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path, help="directory for the trained model")
    return parser.parse_args(arguments)


def load_records(source: str) -> list[Record]:
    """Read a local file, or a data set of the hub."""
    path = Path(source)
    if path.suffix in (".csv", ".tsv") and path.exists():
        import csv

        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    if path.exists():
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SystemExit(f"{source} is no file; data sets of the hub need: pip install datasets") from error
    name, configuration, split = (*source.split(":"), "", "")[:3]
    return list(load_dataset(name, configuration or None, split=split or "train"))


def pad(values: list[Any], fill: int) -> Tensor:
    """Return nested lists of int as a tensor, each level as long as its longest list."""
    if not isinstance(values[0], list):
        return torch.tensor(values)
    rows = [pad(value, fill) for value in values]
    size = [max(lengths) for lengths in zip(*(row.shape for row in rows))]
    whole = torch.full((len(rows), *size), fill, dtype=torch.long)
    for number, row in enumerate(rows):
        whole[(number, *(slice(n) for n in row.shape))] = row
    return whole


def collate(features: list[Record]) -> dict[str, Tensor]:
    """Pad features to a batch."""
    batch = {
        name: pad([feature[name] for feature in features], PAD if name == "input_ids" else IGNORED)
        for name in features[0]
    }
    return {**batch, "attention_mask": (batch["input_ids"] != PAD).long()}


def batches(features: list[Record], size: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Yield batches for ever, in a new order each time round."""
    while True:
        order = torch.randperm(len(features), generator=generator).tolist()
        for start in range(0, max(len(order) - size + 1, 1), size):
            yield collate([features[index] for index in order[start : start + size]])


def build(task: Task, options: argparse.Namespace, records: list[Record]) -> tuple[nn.Module, Encoder]:
    """Load or make the model, and patch it unless that is not wanted."""
    import transformers

    transformers.logging.set_verbosity_error()
    head = getattr(transformers, task.head)
    settings = task.settings(records)
    if options.model:
        encoder = checkpoint_encoder(options.model)
        model = head.from_pretrained(options.model, dtype=torch.float32, **settings)
    else:
        encoder = train_encoder([text for record in records for text in task.texts(record)])
        model = head(transformers.DebertaV2Config(**geometries.settings("small", vocab_size=encoder.size, **settings)))
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not options.no_patch:
        dk.patch(model)
    return task.wrap(model).to(options.device), encoder


def train(
    task: Task, options: argparse.Namespace, model: nn.Module, encoder: Encoder, features: list[Record], quiet: bool
) -> dict[str, Any]:
    """Train, and return losses, tokens per second and peak memory in bytes."""
    from tqdm import trange

    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate)
    scaler = torch.amp.GradScaler(options.device, enabled=options.precision == "float16")
    stream = batches(features, options.batch_size, generator)
    losses: list[float] = []
    tokens, seconds, memory = 0, 0.0, Memory(options.device)
    model.train()
    with trange(options.steps, disable=quiet, unit="step") as progress:
        for step in progress:
            batch = task.prepare(next(stream), encoder, generator)
            batch = {name: x.to(options.device) for name, x in batch.items()}
            start = time.perf_counter()
            with autocast(options):
                loss = model(**batch).loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())  # waits for the device
            if step >= min(SKIPPED_STEPS, options.steps - 1):
                seconds += time.perf_counter() - start
                tokens += int(batch["attention_mask"].sum())
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return {"losses": losses, "tokens_per_second": tokens / seconds, "peak": memory.peak()}


def autocast(options: argparse.Namespace) -> Any:
    """Return the context that computes in the precision asked for."""
    device = torch.device(options.device).type
    return torch.autocast(device, getattr(torch, options.precision), enabled=options.precision != "float32")


@torch.no_grad()
def evaluate(
    task: Task, options: argparse.Namespace, model: nn.Module, encoder: Encoder, features: list[Record]
) -> float:
    """Return the share of right answers."""
    model.eval()
    right = total = 0
    generator = torch.Generator().manual_seed(options.seed)
    for start in range(0, len(features), options.batch_size):
        batch = task.prepare(collate(features[start : start + options.batch_size]), encoder, generator)
        batch = {name: x.to(options.device) for name, x in batch.items()}
        with autocast(options):
            found = task.right(batch, model(**batch))
        right, total = right + found[0], total + found[1]
    return right / max(total, 1)


def stock_model(arguments: list[str], options: argparse.Namespace) -> dict[str, Any] | None:
    """Train the stock model for a few steps in a process of its own, and return what it measured."""
    command = [sys.executable, sys.argv[0], *arguments, "--no-patch", "--no-comparison"]
    command += ["--steps", str(min(options.steps, COMPARED_STEPS))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"the stock model failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def run(task: Task, arguments: list[str] | None = None) -> int:
    """Train the task from the command line; print what came of it, the last line as JSON."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(task, arguments)
    torch.manual_seed(options.seed)
    records = load_records(options.data) if options.data else task.default_records()
    model, encoder = build(task, options, records)
    features = [found for record in records if (found := task.encode(record, encoder, options.length)) is not None]
    random.Random(options.seed).shuffle(features)
    held_out, training = features[::HELD_OUT], [x for number, x in enumerate(features) if number % HELD_OUT]
    found = train(task, options, model, encoder, training, quiet=options.no_comparison)
    losses, share = found.pop("losses"), max(options.steps // 10, 1)
    first, last = (sum(part) / len(part) for part in (losses[:share], losses[-share:]))
    found |= {"patched": not options.no_patch, "first_loss": first, "last_loss": last}
    found["right"] = evaluate(task, options, model, encoder, held_out)
    print(f"loss {first:.3f} -> {last:.3f} in {options.steps} steps; {found['right']:.1%} right on held-out examples")
    rows = [found]
    if not options.no_patch and not options.no_comparison:
        stock = stock_model(arguments, options)
        rows += [stock] if stock else []
    for row in rows:
        name = "patched" if row["patched"] else "stock"
        print(f"{name:8} {row['tokens_per_second']:9.0f} tokens/s   peak memory {row['peak'] / 1e6:7.0f} MB")
    if options.save:
        getattr(model, "model", model).save_pretrained(options.save)
    print(json.dumps(found))
    return 0
