"""torch.compile and torch.export: whole graphs, few recompilations, the same results and refusals."""

from itertools import pairwise

import pytest
import torch
import torch._dynamo.testing

import deberta_kernels as dk
from tests import needs

pytestmark = pytest.mark.usefixtures("counted")

NAMES = ("q", "k", "v", "pos_key", "pos_query")
SETTINGS = {"position_buckets": 8, "max_relative_positions": 16}


def loss(out, lse):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return (out * weight).sum().double() + lse.double().square().sum()


@pytest.mark.parametrize("lengths", [range(2, 52)], ids=["50 lengths"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_whole_with_few_recompilations(backend, lengths, dropout_p, tensors):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(q, k, v, pos_key, pos_query, mask):
        return dk.disentangled_attention(
            q * 1.0, k, v, pos_key, pos_query, attention_mask=mask, return_lse=True, dropout_p=dropout_p,
            backend=backend, **SETTINGS,
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in lengths:
        x = tensors(length, seed=length)
        mask = torch.arange(length) < torch.tensor([[length], [max(1, length // 2)]])
        results = []
        for function in (step, compiled):
            torch.manual_seed(length)
            out, lse = function(*x, mask)
            results.append((out, lse, *torch.autograd.grad(loss(out, lse), x)))
        for name, a, b in zip(("out", "lse", *NAMES), *results):
            torch.testing.assert_close(b, a, msg=lambda text, name=name, n=length: f"{name} at {n}: {text}")
    assert counter.frame_count <= 3
    assert dk.stats()["calls"][backend] == 2 * len(lengths)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_compiles_whole_with_other_choices(name, tensors):
    torch._dynamo.reset()
    x = tensors()
    compiled = torch.compile(
        lambda *x: dk.disentangled_attention(*x, backend=name, **SETTINGS), fullgraph=True, backend="aot_eager"
    )
    found = torch.autograd.grad(compiled(*x).square().sum(), x)
    expected = torch.autograd.grad(dk.disentangled_attention(*x, backend=name, **SETTINGS).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_compiles_packed_sequences(backend, tensors):
    torch._dynamo.reset()
    _, _, _, pos_key, pos_query = tensors()
    q, k, v = (torch.randn(30, 3, 8, requires_grad=True) for _ in range(3))

    def packed(q, k, v, cu_seqlens, max_seqlen):
        return dk.disentangled_attention_varlen(
            q, k, v, pos_key, pos_query, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, backend=backend, **SETTINGS
        )

    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for bounds in ([0, 10, 30], [0, 5, 10, 30], [0, 1, 2, 30], [0, 30]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        longest = max(b - a for a, b in pairwise(bounds))
        found, expected = (f(q, k, v, cu_seqlens, longest) for f in (compiled, packed))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (found, expected)))
    with pytest.raises(ValueError, match="cu_seqlens must end at T = 30"):
        compiled(q, k, v, torch.tensor([0, 10, 31], dtype=torch.int32), 21)


def test_explicit_backend_refuses_in_compiled_code_too(tensors):
    torch._dynamo.reset()
    needs.native_library()
    x = tensors(head_dim=300, grad=False)
    compiled = torch.compile(
        lambda *x: dk.disentangled_attention(*x, backend="cpu", **SETTINGS), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(NotImplementedError, match="head_dim 300"):
        compiled(*x)


def test_exports(backend, tensors):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, pos_key, pos_query):
            return dk.disentangled_attention(q, k, v, pos_key, pos_query, backend=backend, **SETTINGS)

    x = tensors(grad=False)
    length = torch.export.Dim("length", min=2, max=512)
    dims = [{2: length}] * 3 + [None, None]
    program = torch.export.export(Module(), tuple(x), dynamic_shapes=tuple(dims))
    assert "deberta_kernels.attention" in str(program.graph)
    y = tensors(37, grad=False)
    torch.testing.assert_close(program.module()(*y), Module()(*y))
