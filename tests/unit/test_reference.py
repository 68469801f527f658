"""The reference is the formula, Hugging Face's own module, and its own numerical derivative."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from deberta_kernels.impl import reference
from deberta_kernels.masks import parse_huggingface_mask
from deberta_kernels.position import delta
from deberta_kernels.testing import inputs
from deberta_kernels.testing.inputs import Case
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

NAMES = ("q", "k", "v", "pos_key", "pos_query")
TINY = {"dtype": torch.float64, "position_buckets": 4, "max_relative_positions": 6}


def close(got, want, tolerance=1e-12):
    return torch.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def out_of_scalars(problem):
    """The formula of the documentation, one number at a time."""
    batch, heads, nq, _ = problem.q.shape
    nk = problem.k.shape[2]
    out, lse = torch.zeros_like(problem.q), torch.full((batch, heads, nq), -math.inf, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, nq))).tolist():
        scores = []
        for j in range(nk):
            score = problem.q[b, h, i] @ problem.k[b, h, j]
            distance = i - (j - problem.position.prefix_length)
            if j >= problem.position.prefix_length:
                row = int(delta(torch.tensor(distance), problem.position)) - problem.position.first_row
                if problem.pos_key is not None:
                    score = score + problem.q[b, h, i] @ problem.pos_key[h, row]
                if problem.pos_query is not None:
                    score = score + problem.k[b, h, j] @ problem.pos_query[h, row]
            parts = (
                problem.masks.key is None or problem.masks.key[b, j],
                problem.masks.query is None or problem.masks.query[b, i],
                problem.masks.pair is None or problem.masks.pair[b, h % problem.masks.pair.shape[1], i, j],
            )
            scores.append(math.exp(problem.scale * float(score)) if all(parts) else 0.0)
        total = sum(scores)
        weights = [s / total for s in scores] if total else [1 / nk] * nk
        out[b, h, i] = sum(w * problem.v[b, h, j] for j, w in enumerate(weights))
        lse[b, h, i] = math.log(total) if total else -math.inf
    return out, lse


FORMULA = [
    *(Case(nq=7, heads=2, head_dim=3, terms=terms, **TINY) for terms in inputs.TERMS),
    *(Case(nq=6, heads=2, head_dim=3, mask=mask, **TINY) for mask in inputs.MASKS),
    Case(nq=5, nk=8, head_dim=3, **TINY),
    Case(nq=8, nk=3, head_dim=3, mask="holes", **TINY),
    Case(nq=5, nk=8, head_dim=3, prefix_length=3, mask="sparse", **TINY),
    Case(nq=5, nk=8, head_dim=3, prefix_length=3, reachable=True, **TINY),
    Case(nq=3, nk=3, head_dim=3, prefix_length=3, **TINY),
    Case(nq=9, head_dim=3, dtype=torch.float64, position_buckets=-1, max_relative_positions=4, layout="fused"),
]


@pytest.mark.parametrize("case", FORMULA, ids=lambda case: case.id)
def test_equals_the_formula(case):
    problem = inputs.problem(case)
    got, want = reference.attention(problem), out_of_scalars(problem)
    assert close(got[0], want[0])
    assert close(got[1], want[1])


def module_and_problem(pos_att_type, share, buckets, dtype, mask, seed=0):
    """Hugging Face's module with random weights, and the problem that its projections give."""
    from transformers.models.deberta_v2 import modeling_deberta_v2 as upstream

    heads, dim, length, batch = 3, 8, 23, 3
    config = upstream.DebertaV2Config(
        hidden_size=heads * dim, num_attention_heads=heads, relative_attention=True, position_buckets=buckets,
        max_relative_positions=11, pos_att_type=pos_att_type, share_att_key=share, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    module = upstream.DisentangledSelfAttention(config).to(dtype)
    hidden = torch.randn(batch, length, heads * dim, dtype=dtype, requires_grad=True)
    span = buckets if buckets > 0 else 11
    rel = torch.randn(2 * span, heads * dim, dtype=dtype, requires_grad=True)

    def split(x):
        return x.unflatten(-1, (heads, dim)).transpose(-3, -2)

    if share:
        key_proj, query_proj = module.key_proj, module.query_proj
    else:
        key_proj, query_proj = getattr(module, "pos_key_proj", None), getattr(module, "pos_query_proj", None)
    factor = 1 + len(pos_att_type)
    problem = AttentionProblem(
        split(module.query_proj(hidden)),
        split(module.key_proj(hidden)),
        split(module.value_proj(hidden)),
        split(key_proj(rel)) if "c2p" in pos_att_type else None,
        split(query_proj(rel)) if "p2c" in pos_att_type else None,
        parse_huggingface_mask(mask, batch=batch, nq=length, nk=length),
        PositionSpec(buckets, 11),
        # Upstream takes the root in float32 whatever the dtype of the rest.
        1.0 / float(torch.sqrt(torch.tensor(float(dim * factor), dtype=torch.float32))),
    )
    return module, hidden, rel, problem


def huggingface_mask(name):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.arange(23) < torch.tensor([[23], [9], [0]])
    holes = torch.rand(3, 23, generator=generator) < 0.5
    return {
        "none": torch.ones(3, 23, dtype=torch.bool),
        "right_and_empty": tokens,
        "left": tokens.flip(1),
        "holes": holes,
        "keys": holes[:, None, None, :],
        "pairs": torch.rand(3, 1, 23, 23, generator=generator) < 0.2,
        "heads": torch.rand(3, 3, 23, 23, generator=generator) < 0.2,
    }[name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("mask_name", ["none", "right_and_empty", "left", "holes", "keys", "pairs", "heads"])
@pytest.mark.parametrize(
    ("pos_att_type", "share", "buckets"),
    [
        (["c2p", "p2c"], True, 8),
        (["c2p", "p2c"], False, 8),
        (["c2p", "p2c"], True, -1),
        (["c2p"], False, 8),
        (["p2c"], False, 8),
        ([], False, 8),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_equals_hugging_face_on_valid_and_padded_rows(pos_att_type, share, buckets, mask_name, dtype):
    mask = huggingface_mask(mask_name)
    module, hidden, rel, problem = module_and_problem(pos_att_type, share, buckets, dtype, mask)
    dense = mask[:, None, None, :] & mask[:, None, :, None] if mask.dim() == 2 else mask
    want = module(hidden, dense, rel_embeddings=rel)[0]
    got = reference.attention(problem)[0].transpose(1, 2).flatten(2)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert got.dtype == dtype
    assert (got - want).abs().max() <= tolerance
    cotangent = torch.randn(want.shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
    sources = [hidden, rel] if pos_att_type else [hidden]
    ours = torch.autograd.grad(got, sources, cotangent)
    theirs = torch.autograd.grad(want, sources, cotangent)
    for mine, their in zip(ours, theirs, strict=True):
        assert (mine - their).abs().max() <= 30 * tolerance


def gradcheck_cases():
    small = {"batch": 1, "heads": 2, "head_dim": 2, **TINY}
    for terms in inputs.TERMS:
        for mask in inputs.MASKS:
            yield Case(nq=4, terms=terms, mask=mask, **{**small, "batch": 2, "heads": 1})
    for nq, nk in ((1, 1), (1, 5), (5, 1), (3, 5), (5, 3)):
        yield Case(nq=nq, nk=nk, **small)
    for prefix in (1, 2):
        yield Case(nq=3, nk=3 + prefix, prefix_length=prefix, reachable=True, mask="holes", **small)
    for buckets, maximum in ((-1, 3), (2, 4), (6, 3), (3, 9)):
        yield Case(nq=5, **{**small, "position_buckets": buckets, "max_relative_positions": maximum})
    for mask in ("none", "holes_tokens", "sparse"):
        yield Case(nq=4, mask=mask, dropout_p=0.4, **small)
    yield Case(nq=3, packed=True, **{**small, "batch": 3})
    yield Case(nq=3, packed=True, dropout_p=0.4, **{**small, "batch": 3})


GRADCHECKED = list(gradcheck_cases())


def test_gradcheck_covers_sixty_configurations():
    assert len(set(GRADCHECKED)) >= 60


@pytest.mark.parametrize("case", GRADCHECKED, ids=lambda case: case.id)
def test_gradients_are_the_numerical_derivatives(case):
    problem = inputs.problem(case)
    given = {name: getattr(problem, name) for name in NAMES if getattr(problem, name) is not None}
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given.values()]

    def call(*tensors):
        out, lse = reference.attention(replace(problem, **dict(zip(given, tensors, strict=True))))
        # A padded row has lse = -inf whatever the inputs are.
        return out, lse.masked_fill(torch.isneginf(lse), 0.0)

    assert torch.autograd.gradcheck(call, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


def test_backward_is_autograd_of_attention():
    case = Case(nq=9, mask="sparse+holes", dout="transposed", **TINY)
    problem = inputs.problem(case)
    dout = inputs.dout(case, problem)
    leaves = {name: getattr(problem, name).detach().clone().requires_grad_() for name in NAMES}
    out, lse = reference.attention(replace(problem, **leaves))
    dlse = torch.randn(lse.shape, dtype=lse.dtype, generator=torch.Generator().manual_seed(0))
    want = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
    got = reference.backward(problem, dout, dlse, out, lse, (True,) * 5)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    some = reference.backward(problem, dout, dlse, out, lse, (False, True, False, False, True))
    assert [x is not None for x in some] == [False, True, False, False, True]
    assert torch.equal(some.dk, want[1])
    assert reference.backward(problem, dout, dlse, out, lse, (False,) * 5) == (None,) * 5


def test_backward_of_values_alone():
    problem = inputs.problem(Case(nq=5, **TINY))
    out, lse = reference.forward(problem)
    got = reference.backward(problem, torch.ones_like(out), None, out, lse, (False, False, True, False, False))
    assert close(got.dv.sum(2), torch.full_like(got.dv.sum(2), 5.0))


def test_padded_rows_have_the_mean_of_all_values_and_no_lse():
    problem = inputs.problem(Case(nq=9, mask="right_tokens", dropout_p=0.5, **TINY))
    out, lse = reference.forward(problem)
    padded = ~problem.masks.query[:, None, :].expand(lse.shape)
    assert bool(padded.any())
    mean = problem.v.mean(2, keepdim=True).expand(out.shape)
    assert close(out[padded], mean[padded])
    assert torch.equal(torch.isneginf(lse), padded)


def test_masked_keys_are_excluded_however_small_the_others_are():
    problem = inputs.problem(Case(nq=4, batch=1, terms="none", dtype=torch.float32))
    q, k = torch.full_like(problem.q, 200.0), torch.full_like(problem.k, -200.0)
    k[:, :, -1] = 200.0
    masks = Masks(key=torch.tensor([[True, True, True, False]]))
    out, _ = reference.forward(replace(problem, q=q, k=k, masks=masks, scale=1.0))
    assert close(out, problem.v[:, :, :3].mean(2, keepdim=True).expand(out.shape), 1e-6)


@pytest.mark.parametrize("mask", ["holes", "holes_tokens"])
def test_nan_in_padding_stays_in_padding(mask):
    case = Case(nq=9, mask=mask, **TINY)
    problem = inputs.problem(case)
    padding = ~problem.masks.key[:, None, :, None]
    poisoned = {name: getattr(problem, name).masked_fill(padding, float("nan")) for name in ("k", "v")}
    if problem.masks.query is not None:
        poisoned["q"] = problem.q.masked_fill(padding, float("nan"))
    dirty = replace(problem, **poisoned)
    valid = ~padding.expand(problem.q.shape) if problem.masks.query is not None else torch.ones_like(problem.q).bool()
    out, lse = reference.forward(problem)
    got, got_lse = reference.forward(dirty)
    assert torch.equal(got[valid], out[valid])
    assert torch.equal(got_lse, lse)
    dout = torch.where(valid, inputs.dout(case, problem), 0.0)
    clean = reference.backward(problem, dout, None, out, lse, (True,) * 5)
    for mine, other in zip(reference.backward(dirty, dout, None, out, lse, (True,) * 5), clean, strict=True):
        assert torch.equal(mine, other)


def test_nan_in_a_valid_token_reaches_its_sample_and_no_other():
    problem = inputs.problem(Case(nq=6, batch=2, mask="right", **TINY))
    k = problem.k.clone()
    k[0, 0, 0, 0] = float("nan")
    out, _ = reference.forward(replace(problem, k=k))
    assert bool(out[0, 0].isnan().all())
    assert not bool(out[1].isnan().any())


def test_packed_sequences_equal_each_alone():
    problem = inputs.problem(Case(batch=4, nq=9, packed=True, reachable=True, **TINY))
    out, lse = reference.forward(problem)
    bounds = problem.cu_seqlens.tolist()
    for start, stop in pairwise(bounds):
        tokens = (slice(None), slice(None), slice(start, stop))
        alone = replace(problem, q=problem.q[tokens], k=problem.k[tokens], v=problem.v[tokens], cu_seqlens=None)
        want, want_lse = reference.forward(alone)
        assert close(out[tokens], want)
        assert close(lse[tokens], want_lse)


def test_packed_dropout_counts_sequences_as_samples():
    case = Case(batch=3, nq=7, dropout_p=0.5, **TINY)
    batched = inputs.problem(case)
    packed = replace(
        batched,
        **{name: getattr(batched, name).transpose(0, 1).flatten(1, 2).unsqueeze(0) for name in ("q", "k", "v")},
        cu_seqlens=torch.tensor([0, 7, 14, 21], dtype=torch.int32),
    )
    want, _ = reference.forward(batched)
    got, _ = reference.forward(packed)
    assert close(got[0].unflatten(1, (3, 7)).transpose(0, 1), want)


def test_dropout_scales_what_it_keeps_and_leaves_lse():
    problem = inputs.problem(Case(nq=16, batch=1, heads=2, dropout_p=0.25, terms="none", **TINY))
    dim = problem.v.shape[-1]
    probe = replace(problem, v=torch.eye(16, dim, dtype=torch.float64).expand(1, 2, 16, dim))
    probability, lse = reference.forward(replace(probe, dropout_p=0.0))
    dropped, dropped_lse = reference.forward(probe)
    ratio = dropped[..., :16] / probability[..., :16]
    assert close(ratio[ratio != 0], torch.full_like(ratio[ratio != 0], 1 / 0.75))
    assert 0.6 < float((ratio != 0).double().mean()) < 0.9
    assert torch.equal(lse, dropped_lse)


def test_dropout_without_a_seed_is_refused():
    problem = replace(inputs.problem(Case(nq=4, dropout_p=0.5, **TINY)), seed=None)
    with pytest.raises(ValueError, match="seed must be given when dropout_p is not 0"):
        reference.forward(problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32_and_cast_once(dtype):
    problem = inputs.problem(Case(nq=33, dtype=dtype, mask="right_tokens"))
    wide = replace(problem, **{name: getattr(problem, name).float() for name in NAMES})
    out, lse = reference.forward(problem)
    want, want_lse = reference.forward(wide)
    assert out.dtype == dtype
    assert torch.equal(out, want.to(dtype))
    assert torch.equal(lse, want_lse)
    assert lse.dtype == torch.float32


def test_autocast_does_not_reach_the_scores():
    problem = inputs.problem(Case(nq=33))
    want = reference.forward(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = reference.forward(problem)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_output_is_a_view_of_tokens_by_heads():
    out, lse = reference.forward(inputs.problem(Case(nq=5, **TINY)))
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()


@pytest.mark.parametrize(("batch", "nq"), [(0, 5), (2, 0)])
def test_empty_problems_give_empty_results(batch, nq):
    tensors = [torch.zeros(batch, 3, n, 4, requires_grad=True) for n in (nq, 5, 5)]
    table = torch.zeros(3, 8, 4, requires_grad=True)
    problem = AttentionProblem(*tensors, table, table, Masks(), PositionSpec(4, 6), 1.0)
    out, lse = reference.attention(problem)
    assert out.shape == (batch, 3, nq, 4)
    assert lse.shape == (batch, 3, nq)
    out.sum().backward()
    assert not bool(table.grad.any())


def test_nothing_is_refused():
    assert reference.refusal(inputs.problem(Case(nq=4))) is None
