"""Train a patched model in two processes over gloo; run by test_distributed.py, once per process.

Prints one line of JSON: name of a check -> None, or what was wrong.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

import deberta_kernels as dk
from deberta_kernels.models.guards.handover import Handover, handover_of
from deberta_kernels.testing import geometries

SETTINGS = geometries.settings("tiny", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2)
STEPS, BATCH, LENGTH = 4, 8, 24


def build(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**{**SETTINGS, **settings})).train()
    dk.patch(model, strict=True)
    return model


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 64, (BATCH, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH, 9, 15, 4, LENGTH, 20, 3, 11])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": (ids[:, 1] > 32).long()}


def share(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return every second sample, beginning with the rank's own."""
    return {name: x[dist.get_rank() :: 2] for name, x in whole.items()}


def train(model: Any, part: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Train for a few steps; return the parameters, whole."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(STEPS):
        model(**part(batch(step))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        # AdamW moves a weight by 1e-3 a step whatever the size of its gradient; most of that must agree.
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: name + text)


def assert_equal_on_both(parameters: dict[str, torch.Tensor]) -> None:
    for name, value in parameters.items():
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value.contiguous())
        assert torch.equal(*both), name


def shard(model: Any, **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.deberta.encoder.layer:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def ddp(reentrant: bool | None = None) -> None:
    model = build()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    # A reentrant checkpoint fires the hooks of what several layers share more than once; a static graph allows that.
    found = train(DistributedDataParallel(model, static_graph=reentrant is True), share)
    assert_equal_on_both(found)
    assert_close(found, train(build(), lambda whole: whole))


def ddp_with_dropout() -> None:
    model = build(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    torch.manual_seed(dist.get_rank())
    assert_equal_on_both(train(DistributedDataParallel(model), share))


def fsdp(checkpoint: bool = False) -> None:
    model = shard(build())
    assert isinstance(model.deberta.encoder.layer[0], FSDPModule)
    encoder = model.deberta.encoder
    assert all(
        handover_of(x, encoder, lambda attention, seen: True, False, set()) is Handover.PACKED for x in encoder.layer
    )
    if checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    dk.reset_stats()
    found = train(model, share)
    assert sum(dk.stats()["calls"].values()) == STEPS * SETTINGS["num_hidden_layers"] * (2 if checkpoint else 1)
    assert_close(found, train(build(), lambda whole: whole))


def fsdp_in_bfloat16() -> None:
    whole = batch(0)
    plain = build()
    expected = plain(**whole).loss
    model = shard(copy.deepcopy(plain), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    loss = model(**whole).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, atol=0.05, rtol=0.05)
    assert all(torch.isfinite(p.grad.full_tensor()).all() for p in model.parameters())


def accelerate() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-3))
    assert isinstance(model, DistributedDataParallel)
    losses = []
    for _ in range(STEPS):
        loss = model(**share(batch(0))).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_equal_on_both(dict(accelerator.unwrap_model(model).state_dict()))


CHECKS: dict[str, Callable[[], None]] = {
    "ddp": ddp,
    "ddp, reentrant checkpoints": lambda: ddp(reentrant=True),
    "ddp, checkpoints": lambda: ddp(reentrant=False),
    "ddp, dropout": ddp_with_dropout,
    "fsdp2": fsdp,
    "fsdp2, checkpoints": lambda: fsdp(checkpoint=True),
    "fsdp2, bfloat16": fsdp_in_bfloat16,
    "accelerate": accelerate,
}


def main() -> None:
    """Run every check, in the same order in both processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(os.environ["RANK"]), world_size=2)
    outcomes: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            check()
            outcomes[name] = None
        except Exception as error:  # reported by the test of that name
            outcomes[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(outcomes), flush=True)
    dist.barrier()
    # Not by way of torch's own clearing up, in which threads of gloo now and then abort a process that is done.
    os._exit(0)


if __name__ == "__main__":
    main()
