"""The patched encoder creates no tensor that grows with the square of the length, and keeps nothing of a length."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deberta_kernels as dk
from deberta_kernels.linear import products

LENGTH = 131  # no size of the models or tables, and no multiple of a tile


class Recorder(TorchDispatchMode):
    """A mode that records every tensor that an operator returns and whose shape holds the length twice."""

    def __init__(self) -> None:
        super().__init__()
        self.square: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and list(value.shape).count(LENGTH) > 1:
                self.square.append((str(func), tuple(value.shape)))
        return result


def squares(model: Any, inputs: dict[str, torch.Tensor], train: bool) -> list[tuple[str, tuple[int, ...]]]:
    with Recorder() as recorder, torch.set_grad_enabled(train):
        out = model(**inputs)[0]
        if train:
            out.square().sum().backward()
    return recorder.square


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("settings", [{}, {"conv_kernel_size": 3, "share_att_key": False}])
def test_no_tensor_has_the_length_twice(train, settings, build, batch):
    model = build(attention_probs_dropout_prob=0.1, **settings).train(train)
    inputs = batch(2, LENGTH)
    assert squares(model, inputs, train)
    dk.patch(model, strict=True)
    assert squares(model, inputs, train) == []
    dk.patch_all(strict=True)
    dk.unpatch(model)
    assert squares(model, inputs, train) == []


def test_a_mask_of_pairs_is_not_copied_when_it_is_boolean(build):
    encoder = build().encoder
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    dk.patch(encoder, strict=True)
    with torch.no_grad(), Recorder() as recorder:
        encoder(torch.randn(2, LENGTH, 32), mask)
    copies = [
        name for name, _ in recorder.square if not any(v in name for v in ("view", "expand", "unsqueeze", "slice"))
    ]
    assert copies == []


def test_training_saves_little_for_the_backward(build, batch):
    model, inputs = build().train(), batch(2, LENGTH)

    def saved() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**inputs)
        return sum(sizes.values())

    before = saved()
    dk.patch(model)
    assert saved() < before / 3


@pytest.mark.parametrize(("length", "share"), [(512, 0.25), (2048, 0.10)])
def test_attention_keeps_a_fraction_of_what_eager_keeps_for_backward(length, share):
    from benchmarks.training import memory

    eager, ours = (memory.one_attention("v3-base", length, patched) for patched in (False, True))
    assert eager > 12 * length**2 * 4  # at least the probabilities of twelve heads
    assert ours <= share * eager


def test_a_layer_of_an_encoder_keeps_no_copy_for_backward():
    from benchmarks.training import memory

    length, hidden = 2048, 768
    # Input, q, k, v, out, two sums, a norm, and twice four in the feed-forward; the tables are less than one more.
    assert memory.one_layer("v3-base", length, patched=True) < 17 * length * hidden * 4


GROWTH = """
import ctypes, sys
from pathlib import Path
import torch
from transformers import DebertaV2Config, DebertaV2Model
import deberta_kernels as dk

torch.set_num_threads(1)
model = DebertaV2Model(DebertaV2Config(
    vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, type_vocab_size=0,
    max_position_embeddings=64, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"],
    position_biased_input=False,
)).eval().to(getattr(torch, sys.argv[1]))
dk.patch(model, strict=True)

def grown_by(lengths):
    for length in lengths:
        model(input_ids=torch.full((1, length), 7))
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

with torch.no_grad():
    before = grown_by([420, 300, 8])
    print(grown_by([*range(8, 420, 3)]) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lengths_never_seen_before_leave_nothing_behind(dtype):
    """No code and no layout is kept for a number of tokens, in the linear layers or elsewhere."""
    if dtype == "bfloat16" and not products.suits(*torch.ones(2, 16, 16, dtype=torch.bfloat16)):
        pytest.skip("PyTorch multiplies bfloat16 here, and may keep code for each number of tokens")
    environment = {**os.environ, "PYTHONPATH": str(Path(dk.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", GROWTH, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8  # MiB; oneDNN would keep 1 for each length
