"""The functional interface: meaning of its arguments, against the formula written out and against the reference."""

import math
from itertools import pairwise

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels import api
from deberta_kernels.backends import BACKENDS
from deberta_kernels.masks import parse_huggingface_mask
from deberta_kernels.position import delta, reachable_rows
from deberta_kernels.types import Masks, PositionSpec

pytestmark = pytest.mark.usefixtures("counted")

SETTINGS = {"position_buckets": 8, "max_relative_positions": 16}


def formula(q, k, v, pos_key, pos_query, scale, spec):
    """The documented score, element by element."""
    batch, heads, nq, _ = q.shape
    score = torch.empty(batch, heads, nq, k.shape[2], dtype=q.dtype)
    for i in range(nq):
        for j in range(k.shape[2]):
            position = j - spec.prefix_length
            value = (q[:, :, i] * k[:, :, j]).sum(-1)
            if position >= 0:
                row = int(delta(torch.tensor(i - position), spec))
                if pos_key is not None:
                    value = value + (q[:, :, i] * pos_key[:, row]).sum(-1)
                if pos_query is not None:
                    value = value + (k[:, :, j] * pos_query[:, row]).sum(-1)
            score[:, :, i, j] = scale * value
    return torch.softmax(score, -1) @ v, torch.logsumexp(score, -1)


@pytest.mark.parametrize("terms", ["c2p+p2c", "c2p", "p2c", "none"])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("buckets", [(8, 16), (-1, 8)], ids=["log", "linear"])
def test_is_the_documented_formula(tensors, backend, terms, prefix, buckets):
    q, k, v, pos_key, pos_query = tensors(12, 12 + prefix, grad=False)
    pos_key = pos_key if "c2p" in terms else None
    pos_query = pos_query if "p2c" in terms else None
    scale = 1 / math.sqrt(8 * (1 + (pos_key is not None) + (pos_query is not None)))
    spec = PositionSpec(*buckets, 0, prefix)
    out, lse = dk.disentangled_attention(
        q, k, v, pos_key, pos_query, position_buckets=buckets[0], max_relative_positions=buckets[1],
        prefix_length=prefix, return_lse=True, backend=backend,
    )  # fmt: skip
    expected, expected_lse = formula(q, k, v, pos_key, pos_query, scale, spec)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=2e-6, rtol=1e-5)


def test_defaults_are_those_of_the_released_models(backend):
    q, k, v = (torch.randn(1, 2, 7, 16) for _ in range(3))
    pos_key, pos_query = (torch.randn(2, 512, 16) for _ in range(2))
    out = dk.disentangled_attention(q, k, v, pos_key, pos_query, backend=backend)
    expected, _ = formula(q, k, v, pos_key, pos_query, 1 / math.sqrt(48), PositionSpec(256, 512))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_explicit_scale_replaces_the_default(tensors, backend):
    x = tensors(grad=False)
    expected = dk.disentangled_attention(*x, scale=1 / math.sqrt(24), backend=backend, **SETTINGS)
    assert torch.equal(dk.disentangled_attention(*x, backend=backend, **SETTINGS), expected)
    assert not torch.equal(dk.disentangled_attention(*x, scale=0.5, backend=backend, **SETTINGS), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_the_results(tensors, dtype):
    x = tensors(dtype=dtype, grad=False)
    out, lse = dk.disentangled_attention(*x, return_lse=True, backend="torch", **SETTINGS)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert isinstance(dk.disentangled_attention(*x, backend="torch", **SETTINGS), torch.Tensor)


def test_automatic_choice_is_what_explain_says(tensors):
    x = tensors(grad=False)
    explanation = dk.explain(*x, **SETTINGS)
    dk.disentangled_attention(*x, **SETTINGS)
    assert dk.stats()["calls"][explanation.chosen] == 1
    assert sum(dk.stats()["calls"].values()) == 1
    assert set(explanation.reasons) == set(BACKENDS) - {explanation.chosen}


def test_explain_takes_the_same_arguments_and_computes_nothing(tensors):
    x = tensors(grad=False)
    mask = torch.ones(2, 11, dtype=torch.bool)
    arguments = {"attention_mask": mask, "prefix_length": 1, "scale": 0.1, "dropout_p": 0.1, "return_lse": True}
    assert dk.explain(*x, **arguments, **SETTINGS, backend="torch").chosen == "torch"
    assert not any(dk.stats()["calls"].values())
    wide = tensors(head_dim=300, grad=False)
    assert dk.explain(*wide, **SETTINGS, backend="cpu").chosen is None
    assert "head_dim 300" in dk.explain(*wide, **SETTINGS).reasons["cpu"]


@pytest.mark.parametrize("kind", ["key", "pair", "pair per head", "int", "uint8"])
def test_masks_mean_what_is_documented(tensors, backend, kind):
    x = tensors(grad=False)
    mask = torch.rand(2, 11, generator=torch.Generator().manual_seed(1)) > 0.4
    if kind.startswith("pair"):
        mask = mask[:, None, None, :].repeat(1, 3 if kind == "pair per head" else 1, 11, 1)
        mask[0, :, 3, :] = False
    given = {"int": mask.int(), "uint8": mask.to(torch.uint8)}.get(kind, mask)
    out, lse = dk.disentangled_attention(*x, attention_mask=given, return_lse=True, backend=backend, **SETTINGS)
    expected = dk.disentangled_attention(*x, attention_mask=mask, return_lse=True, backend="reference", **SETTINGS)
    torch.testing.assert_close((out, lse), expected, atol=2e-6, rtol=1e-5)
    if kind.startswith("pair"):
        torch.testing.assert_close(out[0, :, 3], x[2][0].mean(1), atol=1e-6, rtol=1e-5)
        assert bool((lse[0, :, 3] == -math.inf).all())
    if mask.dim() == 2:
        changed = [t.clone() for t in x]
        for index in (1, 2):
            changed[index].masked_fill_(~mask[:, None, :, None], 100.0)
        again = dk.disentangled_attention(*changed, attention_mask=given, backend=backend, **SETTINGS)
        torch.testing.assert_close(again, out, atol=2e-6, rtol=1e-5)


def test_packed_sequences_equal_one_call_per_sequence(tensors, backend):
    _, _, _, pos_key, pos_query = tensors(grad=False)
    q, k, v = (torch.randn(24, 3, 8) for _ in range(3))
    bounds = [0, 1, 9, 9, 24]
    out, lse = dk.disentangled_attention_varlen(
        q, k, v, pos_key, pos_query, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), max_seqlen=15,
        return_lse=True, backend=backend, **SETTINGS,
    )  # fmt: skip
    assert out.shape == (24, 3, 8)
    assert out.is_contiguous()
    assert lse.shape == (3, 24)
    for start, stop in pairwise(bounds):
        if start < stop:
            alone = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
            expected = dk.disentangled_attention(
                *alone, pos_key, pos_query, return_lse=True, backend=backend, **SETTINGS
            )
            torch.testing.assert_close(out[start:stop], expected[0][0].transpose(0, 1), atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(lse[:, start:stop], expected[1][0], atol=2e-6, rtol=1e-5)


def test_packed_sequences_are_differentiable_and_drop(tensors, backend):
    *_, pos_key, pos_query = tensors()
    x = [torch.randn(24, 3, 8, requires_grad=True) for _ in range(3)] + [pos_key, pos_query]
    results = []
    for name in ("reference", backend):
        torch.manual_seed(2)
        out = dk.disentangled_attention_varlen(
            *x, cu_seqlens=torch.tensor([0, 10, 24], dtype=torch.int32), max_seqlen=14, dropout_p=0.3,
            backend=name, **SETTINGS,
        )  # fmt: skip
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]])
def test_packed_nothing_gives_nothing(tensors, backend, bounds):
    *_, pos_key, pos_query = tensors()
    q, k, v = (torch.empty(0, 3, 8, requires_grad=True) for _ in range(3))
    out, lse = dk.disentangled_attention_varlen(
        q, k, v, pos_key, pos_query, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), max_seqlen=0,
        return_lse=True, backend=backend, **SETTINGS,
    )  # fmt: skip
    assert (out.shape, lse.shape) == ((0, 3, 8), (3, 0))
    out.sum().backward()
    assert not pos_key.grad.any()


def test_dropout_follows_the_seed_of_torch(tensors, backend):
    x = tensors(40, grad=False)

    def run(seed, p):
        torch.manual_seed(seed)
        return dk.disentangled_attention(*x, dropout_p=p, backend=backend, **SETTINGS)

    assert torch.equal(run(1, 0.5), run(1, 0.5))
    assert not torch.equal(run(1, 0.5), run(2, 0.5))
    torch.manual_seed(1)
    assert not torch.equal(*(dk.disentangled_attention(*x, dropout_p=0.5, backend=backend, **SETTINGS) for _ in "ab"))
    torch.testing.assert_close(run(1, 0.5), _reference_dropout(x, 1), atol=2e-6, rtol=1e-5)


def _reference_dropout(x, seed):
    torch.manual_seed(seed)
    return dk.disentangled_attention(*x, dropout_p=0.5, backend="reference", **SETTINGS)


def test_generator_is_left_alone_without_dropout_and_by_refused_calls(tensors):
    x = tensors(head_dim=300, grad=False)
    before = torch.get_rng_state()
    dk.disentangled_attention(*x, backend="torch", **SETTINGS)
    with pytest.raises(NotImplementedError):
        dk.disentangled_attention(*x, dropout_p=0.5, backend="cuda", **SETTINGS)
    assert torch.equal(torch.get_rng_state(), before)


def test_strided_and_expanded_input(tensors, backend):
    q, k, v, pos_key, pos_query = tensors(grad=False)
    strided = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([k, k], -1)[..., 0],
        v[:, :1].expand(-1, 3, -1, -1),
        pos_key.transpose(0, 1).contiguous().transpose(0, 1),
        pos_query[:1].expand(3, -1, -1),
    ]
    found = dk.disentangled_attention(*strided, backend=backend, **SETTINGS)
    expected = dk.disentangled_attention(*(x.contiguous() for x in strided), backend=backend, **SETTINGS)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_door_for_modules_takes_sliced_tables_and_prepared_ones(tensors, backend):
    q, k, v, pos_key, pos_query = tensors(4, grad=False)
    spec = PositionSpec(8, 16)
    start, stop = reachable_rows(4, 4, spec)
    cut = PositionSpec(8, 16, start)
    sliced = pos_key[:, start:stop], pos_query[:, start:stop]
    masks = parse_huggingface_mask(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), batch=2, nq=4, nk=4)
    out, lse = api.run_attention(q, k, v, *sliced, masks=masks, position=cut, return_lse=True, backend=backend)
    expected = api.run_attention(q, k, v, pos_key, pos_query, masks=masks, position=spec, backend="reference")
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(out[0, :, 3], v[0].mean(1), atol=1e-6, rtol=1e-5)
    assert bool((lse[0, :, 3] == -math.inf).all())
    prepare = getattr(api.dispatch.load(backend), "prepare", None)
    if prepare is not None:
        again = api.run_attention(
            q, k, v, *sliced, masks=masks, position=cut, backend=backend, prepared=prepare(*sliced, cut)
        )
        torch.testing.assert_close(again, out, atol=2e-6, rtol=1e-5)


def test_door_for_modules_takes_packed_sequences(tensors, backend):
    q, k, v, pos_key, pos_query = tensors(20, batch=1, grad=False)
    packed = {"cu_seqlens": torch.tensor([0, 8, 20], dtype=torch.int32), "max_seqlen": 12}
    out = api.run_attention(
        q, k, v, pos_key, pos_query, masks=Masks(), position=PositionSpec(8, 16), backend=backend, **packed
    )
    expected = dk.disentangled_attention_varlen(
        *(x[0].transpose(0, 1) for x in (q, k, v)), pos_key, pos_query, backend=backend, **packed, **SETTINGS
    )
    assert torch.equal(out[0].transpose(0, 1), expected)


def test_prefix_may_cover_every_key(tensors, backend):
    q, k, v, pos_key, pos_query = tensors(5, 3, grad=False)
    out = dk.disentangled_attention(q, k, v, pos_key, pos_query, prefix_length=3, backend=backend, **SETTINGS)
    expected = torch.softmax(q @ k.mT / math.sqrt(24), -1) @ v
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
