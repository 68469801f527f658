"""The training loop: steps, evaluations, the best checkpoint, and a state from which a run goes on bit for bit."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .features import Order, collate, generator
from .progress import Progress
from .task import Data, Feature, InputError, Task
from .vocabulary import Encoder

__all__ = ["Loop", "Standing"]

OF_EVALUATION = 2**40  # in place of a step, where what is masked in evaluation is drawn


@dataclass
class Standing:
    """Where a run stands; all of it plain values."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # since the last evaluation
    tokens: int = 0
    seconds: float = 0.0


def _optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; biases and norms do not decay."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay, rest = [p for p in learned if p.dim() > 1], [p for p in learned if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], options.learning_rate)


def _share_at(options: argparse.Namespace, total: int) -> Callable[[int], float]:
    """Return the share of the highest learning rate at each step."""
    warmup = round(options.warmup * total)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(total - warmup, 1)
        if options.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return 1.0 if options.schedule == "constant" else max(1.0 - done, 0.0)

    return share


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM end the run after the step that is under way; a second one ends it at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)
        for one in before:
            signal.signal(one, before[one])

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:
        pass  # not in the main thread
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Loop:
    """Trains a model on features.

    Args:
        task: what is trained.
        options: the command line.
        model: on its device.
        encoder: its tokenizer.
        data: records that the scorer looks into.
        training: features.
        validation: features.
    """

    def __init__(
        self,
        task: Task,
        options: argparse.Namespace,
        model: nn.Module,
        encoder: Encoder,
        data: Data,
        training: list[Feature],
        validation: list[Feature],
    ) -> None:
        self.task, self.options, self.model, self.encoder, self.data = task, options, model, encoder, data
        self.training, self.validation = training, validation
        self.order = Order(len(training), options.batch_size, options.accumulation, options.seed)
        self.total = options.steps or options.epochs * self.order.steps_per_epoch
        self.optimizer = _optimizer(model, options)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _share_at(options, self.total))
        self.scaler = torch.amp.GradScaler(torch.device(options.device).type, enabled=options.precision == "float16")
        self.standing = Standing()

    def state(self) -> dict[str, Any]:
        """Return all that changes as the run goes on, but for PyTorch's generators."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "standing": vars(self.standing),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned; the model has its weights already."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.standing = Standing(**state["standing"])

    def batch(self, places: list[int], step: int) -> dict[str, Tensor]:
        """Return a batch of training features as the model saw, or will see, it at a step."""
        batch = collate([self.training[place] for place in places], self.encoder.pad)
        batch = self.task.prepare(batch, self.encoder, generator(self.options.seed, step, places[0]))
        return self._on_device(batch)

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(self.options.device) for name, x in batch.items()}

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        """Return the model's output, in the precision asked for."""
        precision = self.options.precision
        with torch.autocast(
            torch.device(self.options.device).type, getattr(torch, precision), enabled=precision != "float32"
        ):
            return model(**batch)

    def run(self, save: Callable[[], None], save_best: Callable[[dict[str, float]], None]) -> bool:
        """Train to the end, or until asked to stop.

        Args:
            save: saves the state.
            save_best: saves the model, given its metrics.

        Returns:
            Whether the run is finished.
        """
        options, standing = self.options, self.standing
        every = options.evaluate_every or self.order.steps_per_epoch
        last = min(self.total, standing.step + options.stop_after) if options.stop_after else self.total
        with Progress(self.total, "training", standing.step) as progress, _asked_to_stop() as asked:
            while standing.step < self.total and not self._waited_enough():
                loss = self._step()
                progress.at(standing.step, self._note(loss))
                evaluated = standing.step % every == 0 or standing.step == self.total
                if evaluated:
                    progress.clear()
                    self._evaluate(save_best)
                leaving = (
                    (asked() or standing.step >= last) and standing.step < self.total and not self._waited_enough()
                )
                if leaving or (standing.step % options.save_every == 0 if options.save_every else evaluated):
                    save()
                if leaving:
                    return False
        if self._waited_enough() and standing.step < self.total:
            print(f"stopped early: no better {options.metric} in {standing.waited} evaluations")
        return True

    def _waited_enough(self) -> bool:
        return bool(self.options.patience) and self.standing.waited >= self.options.patience

    def _note(self, loss: float) -> str:
        standing = self.standing
        rate = self.schedule.get_last_lr()[0]
        epoch = standing.step / self.order.steps_per_epoch
        return (
            f"epoch {epoch:.2f}  loss {loss:.3f}  rate {rate:.1e}  {standing.tokens / standing.seconds:,.0f} tokens/s"
        )

    def _step(self) -> float:
        """Take one step of the optimizer; return its loss."""
        self.model.train()
        start, standing = time.perf_counter(), self.standing
        batches = self.order.step(standing.step)
        rows, whole = sum(map(len, batches)), 0.0
        for places in batches:
            batch = self.batch(places, standing.step)
            # Each row counts the same, in a smaller last batch too.
            loss = self.forward(self.model, batch).loss * (len(places) / rows)
            self.scaler.scale(loss).backward()
            whole += loss.item()  # waits for the device
            standing.tokens += int(batch["attention_mask"].sum())
        if not math.isfinite(whole) and not self.scaler.is_enabled():
            raise InputError(
                f"the loss became {whole} at step {standing.step + 1}; try a lower --learning-rate"
                f"{'' if self.options.precision == 'float32' else ' or --precision float32'}."
            )
        self.scaler.unscale_(self.optimizer)
        if self.options.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        standing.step += 1
        standing.losses.append(whole)
        standing.seconds += time.perf_counter() - start
        return whole

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return the metrics of the validation features."""
        self.model.eval()
        scorer = self.task.scorer(self.data, self.options)
        size = self.options.batch_size
        with Progress(len(self.validation), "evaluation") as progress:
            for start in range(0, len(self.validation), size):
                features = self.validation[start : start + size]
                batch = collate(features, self.encoder.pad)
                batch = self.task.prepare(batch, self.encoder, generator(self.options.seed, OF_EVALUATION, start))
                scorer.add(features, batch, self._output(batch))
                progress.at(start + len(features))
        return scorer.result()

    def _output(self, batch: dict[str, Tensor]) -> Any:
        output = self.forward(self.model, self._on_device(batch))
        for name, value in list(output.items()):
            if isinstance(value, Tensor):
                output[name] = value.float().cpu()
        return output

    def _evaluate(self, save_best: Callable[[dict[str, float]], None]) -> None:
        standing, name = self.standing, self.options.metric
        found = self.metrics()
        value = found[name]
        lower = name in self.task.lower_is_better
        better = standing.best is None or (value < standing.best if lower else value > standing.best)
        mean = sum(standing.losses) / max(len(standing.losses), 1)
        standing.history.append({"step": standing.step, "training_loss": mean, **found})
        standing.losses = []
        shown = "  ".join(f"{metric} {number:.4g}" for metric, number in found.items())
        print(
            f"step {standing.step}/{self.total}  training loss {mean:.4g}  {shown}{'  best' if better else ''}",
            flush=True,
        )
        if better:
            standing.best, standing.best_step, standing.waited = value, standing.step, 0
            save_best(found)
        else:
            standing.waited += 1
