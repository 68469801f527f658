"""Each form of a mask means what it says, and everything else is refused by name."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deberta_kernels.masks import allowed, parse_attention_mask, parse_huggingface_mask
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

B, H, NQ, NK = 2, 3, 4, 5
CPU = torch.device("cpu")


def parse(mask):
    return parse_attention_mask(mask, batch=B, heads=H, nq=NQ, nk=NK, device=CPU)


def parse_square(mask, batch=B, n=NK):
    return parse_huggingface_mask(mask, batch=batch, nq=n, nk=n)


def draw(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5


def problem(masks=Masks(), nq=NQ, nk=NK, batch=B, cu_seqlens=None):  # noqa: B008
    q, k = torch.zeros(batch, H, nq, 2), torch.zeros(batch, H, nk, 2)
    return AttentionProblem(q, k, k, None, None, masks, PositionSpec(), 1.0, cu_seqlens=cu_seqlens)


def only(masks, part):
    others = {"key", "query", "pair"} - {part}
    assert all(getattr(masks, other) is None for other in others)
    return getattr(masks, part)


@pytest.mark.parametrize(
    ("shape", "part"), [((B, NK), "key"), ((B, 1, NQ, NK), "pair"), ((B, H, NQ, NK), "pair")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.uint32])
def test_functional_forms(shape, part, dtype):
    mask = draw(*shape)
    got = only(parse(mask.to(dtype)), part)
    assert got.dtype == torch.bool
    assert torch.equal(got, mask)


def test_no_mask_masks_nothing():
    assert parse(None) == Masks()
    assert parse_square(None) == Masks()
    assert allowed(problem()) is None


@pytest.mark.parametrize("value", [2, -1])
def test_other_integers_than_0_and_1_are_refused(value):
    mask = torch.ones(B, NK, dtype=torch.int32)
    mask[1, 2] = value
    with pytest.raises(
        ValueError, match=rf"attention_mask must hold 0 .* and 1 .* only, got {value}; pass `mask != 0`"
    ):
        parse(mask)


@pytest.mark.parametrize("shape", [(B,), (B, NQ), (1, NK), (B, NQ, NK), (B, 2, NQ, NK), (B, 1, 1, NK), (1, 1, NQ, NK)])
def test_wrong_shapes_name_both(shape):
    with pytest.raises(ValueError, match=r"attention_mask must have shape .*\(2, 5\).*got \(" + str(shape[0])):
        parse(draw(*shape))


@pytest.mark.parametrize("value", [0.0, 1.0, float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float_masks_are_refused_whatever_they_hold(value, dtype):
    """Zeros attend everywhere where a mask is added to scores, and nowhere where it says what to keep."""
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        TypeError, match=rf"must be bool, or integers 0 and 1, got {name}; pass `mask == 0` if .* added"
    ):
        parse(torch.full((B, NK), value, dtype=dtype))


@pytest.mark.parametrize("mask", [[[True] * NK] * B, 1, "mask"])
def test_what_is_not_a_tensor_is_refused(mask):
    with pytest.raises(TypeError, match="attention_mask must be a bool tensor or None, got"):
        parse(mask)


def test_complex_masks_are_refused():
    with pytest.raises(TypeError, match=r"attention_mask must be bool, or integers 0 and 1, got complex64"):
        parse(torch.zeros(B, NK, dtype=torch.complex64))


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="attention_mask must be on the device of q, cpu, got meta"):
        parse(torch.zeros(B, NK, device="meta", dtype=torch.bool))


def test_values_are_not_read_where_there_are_none():
    with FakeTensorMode():
        assert parse(torch.zeros(B, NK, dtype=torch.int64)).key.shape == (B, NK)
    compiled = torch.compile(lambda m: parse(m).key, fullgraph=True, backend="eager")
    mask = draw(B, NK)
    assert torch.equal(compiled(mask.long() * 3), mask)


def test_huggingface_token_mask_makes_queries_padding_too():
    mask = draw(B, NK)
    masks = parse_square(mask.long())
    assert torch.equal(masks.key, mask)
    assert torch.equal(masks.query, mask)
    assert masks.pair is None


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((B, 1, 1, NK), "key"),
        ((1, 1, 1, NK), "key"),
        ((B, 1, NK, 1), "query"),
        ((B, NK, NK), "pair"),
        ((1, NK, NK), "pair"),
        ((B, 1, NK, NK), "pair"),
        ((B, H, NK, NK), "pair"),
        ((1, H, NK, NK), "pair"),
        ((B, H, 1, NK), "pair"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
def test_huggingface_forms_forbid_what_upstream_masks(shape, part, dtype):
    mask = draw(*shape)
    masks = parse_square(mask.to(dtype))
    only(masks, part)
    # Upstream: a 3-D mask gets a head dimension in the encoder, and the attention broadcasts it against the scores.
    upstream = mask.unsqueeze(1) if mask.dim() == 3 else mask
    want = upstream.expand(B, H, NK, NK)
    assert torch.equal(allowed(problem(masks, nq=NK)).expand(B, H, NK, NK), want)


def test_huggingface_token_mask_is_the_outer_product():
    mask = draw(B, NK).long()
    want = mask[:, None, None, :] * mask[:, None, :, None] != 0
    assert torch.equal(allowed(problem(parse_square(mask), nq=NK)), want)


@pytest.mark.parametrize("value", [0.5, -1.0, float("-inf"), float("nan")])
def test_huggingface_keeps_whatever_is_not_zero(value):
    mask = torch.tensor([[value, 0.0]])
    assert parse_square(mask, batch=1, n=2).key.tolist() == [[True, False]]


@pytest.mark.parametrize("shape", [(NK,), (3, NK), (B, 4), (B, 4, NK), (B, 1, 4, NK), (B, 1, NK, 4), (1, 1, 1, 1, NK)])
def test_huggingface_wrong_shapes_name_both(shape):
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, N\).*B = 2, Nq = 5, Nk = 5, got \("):
        parse_square(draw(*shape))


def test_huggingface_token_mask_needs_equal_lengths():
    with pytest.raises(ValueError, match="Nq = 4, Nk = 5"):
        parse_huggingface_mask(draw(B, NK), batch=B, nq=NQ, nk=NK)


def test_allowed_is_the_conjunction_of_the_parts():
    key, query, pair = draw(B, NK), draw(B, NQ), draw(B, H, NQ, NK)
    got = allowed(problem(Masks(key, query, pair)))
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (B, H, NQ, NK))).tolist():
        assert bool(got[b, h, i, j]) == bool(key[b, j] and query[b, i] and pair[b, h, i, j])


@pytest.mark.parametrize("bounds", [[0, 1], [0, 3, 4, 9], [0, 2, 2, 5]])
def test_packed_sequences_see_only_themselves(bounds):
    tokens = bounds[-1]
    owner = [next(s for s in range(len(bounds)) if token < bounds[s + 1]) for token in range(tokens)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    got = allowed(problem(nq=tokens, nk=tokens, batch=1, cu_seqlens=cu_seqlens))
    assert got.shape == (1, 1, tokens, tokens)
    assert got[0, 0].tolist() == [[a == b for b in owner] for a in owner]


@pytest.mark.parametrize(("read", "shape"), [(parse, (B, NK)), (parse, (B, 1, NQ, NK)), (parse_square, (B, NK))])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_what_a_backward_reads_is_not_the_callers(read, shape, dtype):
    """NumPy changes masks without a trace, and no backward keeps a tensor that was made in inference mode."""
    with torch.inference_mode():
        mask = draw(*shape).to(dtype)
    masks = read(mask)
    kept = masks.key if masks.pair is None else masks.pair
    want = kept.clone()
    mask.numpy()[:] = 1 - mask.numpy().astype(int)
    assert torch.equal(kept, want)
    assert not kept.is_inference()
    with torch.no_grad():
        masks = read(mask)
    kept = masks.key if masks.pair is None else masks.pair
    assert (kept.data_ptr() == mask.data_ptr()) == (dtype == torch.bool)


def test_a_copy_of_an_expanded_mask_takes_no_more_memory():
    row = draw(B, 1, 1, NK)
    kept = parse(row.expand(B, H, NQ, NK)).pair
    assert torch.equal(kept, row.expand(B, H, NQ, NK))
    assert kept.untyped_storage().nbytes() == row.numel()
    assert kept.data_ptr() != row.data_ptr()
    empty = torch.zeros(B, NQ, 0, dtype=torch.bool)[:, None].expand(B, H, NQ, 0)
    assert parse_attention_mask(empty, batch=B, heads=H, nq=NQ, nk=0, device=CPU).pair.shape == (B, H, NQ, 0)
