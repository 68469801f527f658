"""Bad input: every case is a named error before anything runs, and the next good call is right."""

import re
from fractions import Fraction

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels import api, notices
from deberta_kernels.types import Masks, PositionSpec

B, H, NQ, NK, D, SPAN = 2, 3, 5, 7, 8, 8
VALUE, TYPE, BOOL = ValueError, TypeError, torch.bool

# Argument and expectation, what came, what to do next.
COMPLETE = re.compile(r"^\S.* must .*\bgot .*; .+\.$|^backend='cuda' cannot run this call: .*; pass .+\.$")


def good(**changes):
    """Return the arguments of a good call, some of them replaced."""
    generator = torch.Generator().manual_seed(0)
    call = {
        "q": torch.randn(B, H, NQ, D, generator=generator),
        "k": torch.randn(B, H, NK, D, generator=generator),
        "v": torch.randn(B, H, NK, D, generator=generator),
        "pos_key": torch.randn(H, 2 * SPAN, D, generator=generator),
        "pos_query": torch.randn(H, 2 * SPAN, D, generator=generator),
        "position_buckets": SPAN,
        "max_relative_positions": 16,
        "backend": "torch",
    }
    for name, change in changes.items():
        call[name] = change(call[name]) if callable(change) else change
    return call


def packed(**changes):
    call = good()
    for index, name in enumerate("qkv"):
        call[name] = torch.randn(12, H, D, generator=torch.Generator().manual_seed(index))
    call |= {"cu_seqlens": torch.tensor([0, 5, 12], dtype=torch.int32), "max_seqlen": 7}
    for name, change in changes.items():
        call[name] = change(call[name]) if callable(change) else change
    return call


def door(**changes):
    call = good() | {"masks": Masks(), "position": PositionSpec(SPAN, 16)}
    for name in ("position_buckets", "max_relative_positions"):
        del call[name]
    for name, change in changes.items():
        call[name] = change(call[name]) if callable(change) else change
    return call


@pytest.fixture(autouse=True)
def the_next_good_call_is_right():
    """After whatever a test does, good calls give the same bits as before it."""
    state = torch.get_rng_state()
    before = dk.disentangled_attention(**good()), dk.disentangled_attention_varlen(**packed())
    dk.reset_stats()
    yield
    assert not any(dk.stats()["calls"].values())
    assert torch.equal(torch.get_rng_state(), state)
    after = dk.disentangled_attention(**good()), dk.disentangled_attention_varlen(**packed())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    torch.testing.assert_close(after[0], dk.disentangled_attention(**good(backend="reference")), atol=2e-6, rtol=1e-5)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def cut(*index):
    return lambda x: x[index]


def cast(dtype):
    return lambda x: x.to(dtype)


def meta(x):
    return x.to("meta")


FIXED = {
    "q not a tensor": ({"q": [1.0]}, TYPE, "q must be a tensor, got list; convert it"),
    "k None": ({"k": None}, TYPE, "k must be a tensor, got None (NoneType); convert it"),
    "v a number": ({"v": 3}, TYPE, "v must be a tensor, got 3 (int)"),
    "pos_key a string": ({"pos_key": "c2p"}, TYPE, "pos_key must be a tensor, got 'c2p' (str)"),
    "q integer": ({"q": cast(torch.int64)}, TYPE, "q must have dtype float32, float16, bfloat16 or float64, got"),
    "q complex": ({"q": cast(torch.complex64)}, TYPE, "q must have dtype float32, float16, bfloat16 or float64, got"),
    "q bool": ({"q": cast(torch.bool)}, TYPE, "got bool; cast it"),
    "q float8": ({"q": cast(torch.float8_e4m3fn)}, TYPE, "got float8_e4m3fn; cast it"),
    "k mixed": ({"k": cast(torch.bfloat16)}, TYPE, "k must have the dtype of q, float32, got bfloat16; cast it with"),
    "v mixed": ({"v": cast(torch.float64)}, TYPE, "v must have the dtype of q, float32, got float64; cast it"),
    "pos_key mixed": ({"pos_key": cast(torch.float16)}, TYPE, "pos_key must have the dtype of q, float32, got"),
    "pos_query mixed": ({"pos_query": cast(torch.int32)}, TYPE, "pos_query must have the dtype of q, float32, got"),
    "k device": ({"k": meta}, VALUE, "k must be on the device of q, cpu, got meta; move it"),
    "v device": ({"v": meta}, VALUE, "v must be on the device of q, cpu, got meta; move it"),
    "pos_query device": ({"pos_query": meta}, VALUE, "pos_query must be on the device of q, cpu, got meta"),
    "q rank": ({"q": cut(0)}, VALUE, "q must have shape (B, H, N, D), got (3, 5, 8)"),
    "k rank": ({"k": lambda x: x[None]}, VALUE, "k must have shape (B, H, N, D), got (1, 2, 3, 7, 8)"),
    "v rank": ({"v": cut(0)}, VALUE, "v must have shape (B, H, N, D), got (3, 7, 8)"),
    "no head_dim": ({"q": cut(..., slice(0))}, VALUE, "q must have a head_dim D of at least 1, got shape (2, 3, 5, 0)"),
    "k batch": ({"k": cut(slice(1))}, VALUE, "k must have shape (B, H, Nk, D) = (2, 3, Nk, 8), got (1, 3, 7, 8)"),
    "k heads": ({"k": lambda x: x[:, :2]}, VALUE, "k must have shape (B, H, Nk, D) = (2, 3, Nk, 8), got (2, 2, 7, 8)"),
    "k head_dim": ({"k": cut(..., slice(4))}, VALUE, "k must have shape (B, H, Nk, D) = (2, 3, Nk, 8), got"),
    "v length": ({"v": lambda x: x[:, :, :6]}, VALUE, "v must have the shape of k, (2, 3, 7, 8), got (2, 3, 6, 8)"),
    "v head_dim": ({"v": cut(..., slice(4))}, VALUE, "v must have the shape of k, (2, 3, 7, 8), got (2, 3, 7, 4)"),
    "no keys": (
        {"k": lambda x: x[:, :, :0], "v": lambda x: x[:, :, :0]},
        VALUE,
        "k must hold at least one key for 5 queries, got shape (2, 3, 0, 8)",
    ),
    "pos_key height": (
        {"pos_key": lambda x: x[:, :SPAN]},
        VALUE,
        "pos_key must have shape (H, 2*att_span, D) = (3, 16, 8), got (3, 8, 8); check position_buckets.",
    ),
    "pos_query height": ({"pos_query": lambda x: x[:, 1:]}, VALUE, "= (3, 16, 8), got (3, 15, 8); check"),
    "pos_key heads": ({"pos_key": cut(slice(1))}, VALUE, "pos_key must have shape (H, 2*att_span, D) = (3, 16, 8)"),
    "pos_key head_dim": ({"pos_key": cut(..., slice(4))}, VALUE, "= (3, 16, 8), got (3, 16, 4)"),
    "pos_key rank": ({"pos_key": lambda x: x[None]}, VALUE, "= (3, 16, 8), got (1, 3, 16, 8)"),
    "buckets do not fit": ({"position_buckets": 16}, VALUE, "= (3, 32, 8), got (3, 16, 8); check position_buckets."),
    "linear span does not fit": ({"position_buckets": 0}, VALUE, "= (3, 32, 8), got (3, 16, 8)"),
    "too many buckets": ({"position_buckets": 2**30 + 1}, VALUE, "position_buckets must be at most 2**30, got 10737"),
    "linear span too far": (
        {"position_buckets": 0, "max_relative_positions": 2**62},
        VALUE,
        "max_relative_positions must be at most 2**30, got 4611686018427387904; kernels count rows in 32 bits",
    ),
    "mask without memory": (
        {"attention_mask": torch._efficientzerotensor((B, NK), dtype=BOOL)}, VALUE, "attention_mask must have memory",
    ),
    "both not positive": (
        {"position_buckets": -1, "max_relative_positions": -1},
        VALUE,
        "position_buckets or max_relative_positions must be positive, got position_buckets=-1 and",
    ),
    "both zero": ({"position_buckets": 0, "max_relative_positions": 0}, VALUE, "pass its max_position_embeddings"),
    "one bucket": ({"position_buckets": 1}, VALUE, "position_buckets must be at least 2, or <= 0"),
    "buckets float": ({"position_buckets": 8.0}, TYPE, "position_buckets must be an int, got 8.0 (float)"),
    "max positions None": ({"max_relative_positions": None}, TYPE, "max_relative_positions must be an int, got"),
    "prefix bool": ({"prefix_length": True}, TYPE, "prefix_length must be an int, got True (bool)"),
    "prefix negative": ({"prefix_length": -1}, VALUE, "prefix_length must be between 0 and the number of keys, 7"),
    "prefix too long": ({"prefix_length": 8}, VALUE, "prefix_length must be between 0 and the number of keys, 7"),
    "dropout 1": ({"dropout_p": 1.0}, VALUE, "dropout_p must be in [0, 1), got 1.0"),
    "dropout 1 as a float": ({"dropout_p": Fraction(10**30 - 1, 10**30)}, VALUE, "dropout_p must be in [0, 1), got 99"),
    "dropout infinite as a float": ({"dropout_p": 10**400}, VALUE, "dropout_p must be in [0, 1), got 1000"),
    "dropout negative": ({"dropout_p": -0.1}, VALUE, "dropout_p must be in [0, 1), got -0.1"),
    "dropout NaN": ({"dropout_p": float("nan")}, VALUE, "dropout_p must be in [0, 1), got nan"),
    "dropout above 1": ({"dropout_p": 2}, VALUE, "dropout_p must be in [0, 1), got 2"),
    "dropout None": ({"dropout_p": None}, TYPE, "dropout_p must be a number, got None (NoneType)"),
    "dropout bool": ({"dropout_p": False}, TYPE, "dropout_p must be a number, got False (bool)"),
    "scale NaN": ({"scale": float("nan")}, VALUE, "scale must be a positive number, normal in float32 (1.2e-38 to"),
    "scale infinite": ({"scale": float("inf")}, VALUE, "to 3.4e+38), got inf; pass None for 1 / sqrt(D"),
    "scale 0": ({"scale": 0}, VALUE, "scale must be a positive number, normal in float32"),
    "scale negative": ({"scale": -0.25}, VALUE, "to 3.4e+38), got -0.25; pass None"),
    "scale subnormal in float32": ({"scale": 1e-39}, VALUE, "to 3.4e+38), got 1e-39; pass None"),
    "scale 0 in float32": ({"scale": 5e-324}, VALUE, "to 3.4e+38), got 5e-324; pass None"),
    "scale infinite in float32": ({"scale": 1e39}, VALUE, "to 3.4e+38), got 1e+39; pass None"),
    "scale beyond floats": ({"scale": 10**400}, VALUE, "to 3.4e+38), got 1000"),
    "scale tensor": ({"scale": torch.tensor(0.1)}, TYPE, "scale must be a number or None, got Tensor"),
    "scale string": ({"scale": "auto"}, TYPE, "scale must be a number or None, got 'auto' (str)"),
    "backend unknown": ({"backend": "gpu"}, VALUE, "backend must be one of auto, reference, "),
    "backend None": ({"backend": None}, TYPE, "backend must be a string, one of auto,"),
    "backend elsewhere": ({"backend": "cuda"}, NotImplementedError, "backend='cuda' cannot run this call: it runs on"),
    "mask not a tensor": ({"attention_mask": [[True] * 7] * 2}, TYPE, "attention_mask must be a bool tensor"),
    "mask complex": ({"attention_mask": torch.ones(B, NK, dtype=torch.complex64)}, TYPE, "attention_mask must be"),
    "mask length": ({"attention_mask": torch.ones(B, NQ, dtype=BOOL)}, VALUE, "attention_mask must have shape (B, Nk)"),
    "mask batch": ({"attention_mask": torch.ones(1, NK, dtype=BOOL)}, VALUE, "attention_mask must have shape"),
    "mask heads": ({"attention_mask": torch.ones(B, 2, NQ, NK, dtype=BOOL)}, VALUE, "attention_mask must have"),
    "mask rank": ({"attention_mask": torch.ones(B, NQ, NK, dtype=BOOL)}, VALUE, "got (2, 5, 7)"),
    "mask additive": ({"attention_mask": torch.full((B, NK), -1e9)}, TYPE, "integers 0 and 1, got float32; pass `mask"),
    "mask of other integers": ({"attention_mask": torch.full((B, NK), 7)}, VALUE, "must hold 0 (forbidden) and 1"),
    "mask device": ({"attention_mask": torch.ones(B, NK, device="meta") > 0}, VALUE, "attention_mask must be on the"),
}  # fmt: skip

PACKED = {
    "q rank": ({"q": lambda x: x[None]}, VALUE, "q must have shape (T, H, D), got (1, 12, 3, 8)"),
    "k length": ({"k": lambda x: x[:11]}, VALUE, "k must have the shape of q, (12, 3, 8), got (11, 3, 8)"),
    "v length": ({"v": lambda x: x[:11]}, VALUE, "v must have the shape of k, (12, 3, 8), got (11, 3, 8)"),
    "k rank": ({"k": cut(0)}, VALUE, "k must have shape (T, H, D), got (3, 8)"),
    "pos_key height": ({"pos_key": lambda x: x[:, :9]}, VALUE, "pos_key must have shape (H, 2*att_span, D)"),
    "cu_seqlens a list": ({"cu_seqlens": [0, 12]}, TYPE, "cu_seqlens must be a tensor, got list"),
    "cu_seqlens int64": ({"cu_seqlens": torch.tensor([0, 12])}, TYPE, "cu_seqlens must have dtype int32, got int64"),
    "cu_seqlens float": ({"cu_seqlens": torch.tensor([0.0, 12.0])}, TYPE, "cu_seqlens must have dtype int32, got"),
    "cu_seqlens empty": ({"cu_seqlens": int32()}, VALUE, "cu_seqlens must have shape (S + 1,) for S sequences, got"),
    "cu_seqlens rank": ({"cu_seqlens": int32(0, 12)[None]}, VALUE, "cu_seqlens must have shape (S + 1,) for S"),
    "cu_seqlens device": ({"cu_seqlens": meta}, VALUE, "cu_seqlens must be on the device of q, cpu, got meta"),
    "cu_seqlens start": ({"cu_seqlens": int32(1, 12)}, VALUE, "cu_seqlens must start at 0, got 1"),
    "cu_seqlens negative start": ({"cu_seqlens": int32(-5, 12)}, VALUE, "cu_seqlens must start at 0, got -5"),
    "cu_seqlens falls": ({"cu_seqlens": int32(0, 7, 5, 12)}, VALUE, "cu_seqlens must not fall, got 7 followed by 5"),
    "cu_seqlens negative": ({"cu_seqlens": int32(0, -3, 12)}, VALUE, "cu_seqlens must not fall, got 0 followed by"),
    "cu_seqlens short": ({"cu_seqlens": int32(0, 5, 11)}, VALUE, "cu_seqlens must end at T = 12, the number of"),
    "cu_seqlens long": ({"cu_seqlens": int32(0, 5, 13)}, VALUE, "cu_seqlens must end at T = 12, the number of"),
    "cu_seqlens one": ({"cu_seqlens": int32(0)}, VALUE, "cu_seqlens must end at T = 12, the number of tokens of q"),
    "max_seqlen small": ({"max_seqlen": 6}, VALUE, "max_seqlen must be at least 7, the longest sequence of"),
    "max_seqlen negative": ({"max_seqlen": -1}, VALUE, "max_seqlen must not be negative, got -1"),
    "max_seqlen float": ({"max_seqlen": 7.0}, TYPE, "max_seqlen must be an int, got 7.0 (float)"),
    "max_seqlen None": ({"max_seqlen": None}, TYPE, "max_seqlen must be an int, got None"),
    "backend unknown": ({"backend": "gpu"}, VALUE, "backend must be one of"),
    "dropout 1": ({"dropout_p": 1}, VALUE, "dropout_p must be in [0, 1), got 1;"),
    "scale NaN": ({"scale": float("nan")}, VALUE, "scale must be a positive number"),
    "both not positive": ({"position_buckets": 0, "max_relative_positions": -1}, VALUE, "must be positive, got"),
}  # fmt: skip

DOOR = {
    "tables of unequal height": ({"pos_query": lambda x: x[:, :9]}, VALUE, "pos_query must have as many rows as"),
    "table rank": ({"pos_key": cut(0)}, VALUE, "pos_key must have shape (H, 2*att_span, D) = (3, None, 8)"),
    "table heads": ({"pos_key": cut(slice(2))}, VALUE, "= (3, 16, 8), got (2, 16, 8); check how the table was"),
    "rows past the end": ({"position": PositionSpec(SPAN, 16, 1)}, VALUE, "inside the full table of 2*att_span = 16"),
    "rows before the start": ({"position": PositionSpec(SPAN, 16, -1)}, VALUE, "got first_row=-1 and 16 rows"),
    "first_row float": ({"position": PositionSpec(SPAN, 16, 0.0)}, TYPE, "first_row must be an int, got 0.0"),
    "unreachable rows missing": (
        {"position": PositionSpec(SPAN, 16, 6), "pos_key": lambda x: x[:, 6:], "pos_query": lambda x: x[:, 6:]},
        VALUE,
        "must hold the rows",
    ),
    "key mask short": ({"masks": Masks(key=torch.ones(B, 6) > 0)}, VALUE, "masks.key must have shape (2, 7), got"),
    "query mask long": ({"masks": Masks(query=torch.ones(B, 7) > 0)}, VALUE, "masks.query must have shape (2, 5)"),
    "pair mask heads": ({"masks": Masks(pair=torch.ones(B, 2, 5, 7) > 0)}, VALUE, "masks.pair must have shape"),
    "mask not bool": ({"masks": Masks(key=torch.ones(B, 7))}, TYPE, "masks.key must have dtype bool, got float32"),
    "mask a list": ({"masks": Masks(key=[[True]])}, TYPE, "masks.key must be a tensor, got list"),
    "mask device": ({"masks": Masks(key=torch.ones(B, 7, device="meta") > 0)}, VALUE, "masks.key must be on the"),
    "packed unequal": ({"cu_seqlens": int32(0, 5), "max_seqlen": 5}, VALUE, "q and k must have shape (1, H, T, D)"),
    "backend unknown": ({"backend": "gpu"}, VALUE, "backend must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_functional_interface_names_the_argument(name):
    changes, kind, text = FIXED[name]
    call = good(**changes)
    with pytest.raises(kind, match=re.escape(text)) as caught:
        dk.disentangled_attention(**call)
    assert COMPLETE.search(str(caught.value))
    if name != "backend elsewhere":
        with pytest.raises(kind, match=re.escape(text)):
            dk.explain(**call)


@pytest.mark.parametrize("name", PACKED)
def test_packed_interface_names_the_argument(name):
    changes, kind, text = PACKED[name]
    with pytest.raises(kind, match=re.escape(text)) as caught:
        dk.disentangled_attention_varlen(**packed(**changes))
    assert COMPLETE.search(str(caught.value))


@pytest.mark.parametrize("name", DOOR)
def test_door_for_modules_names_the_argument(name):
    changes, kind, text = DOOR[name]
    with pytest.raises(kind, match=re.escape(text)) as caught:
        api.run_attention(**door(**changes))
    assert COMPLETE.search(str(caught.value))


def test_door_for_modules_takes_no_mask_with_packed_sequences():
    q = torch.ones(1, H, 12, D)
    for masks in (Masks(key=torch.ones(1, 12) > 0), Masks(pair=torch.ones(1, 1, 12, 12) > 0)):
        with pytest.raises(ValueError, match=r"must be None with cu_seqlens, got shape .*; pack only real tokens"):
            api.run_attention(
                q,
                q,
                q,
                None,
                None,
                masks=masks,
                position=PositionSpec(SPAN, 16),
                cu_seqlens=int32(0, 12),
                max_seqlen=12,
            )


def test_packed_interface_needs_its_bounds():
    call = packed()
    del call["cu_seqlens"]
    with pytest.raises(TypeError, match="cu_seqlens"):
        dk.disentangled_attention_varlen(**call)
    with pytest.raises(TypeError, match="attention_mask"):
        dk.disentangled_attention_varlen(**packed(), attention_mask=None)


def test_numbers_of_other_types_are_taken():
    call = good(scale=Fraction(1, 5), dropout_p=Fraction(0), backend="torch")
    expected = good(scale=0.2)
    assert torch.equal(dk.disentangled_attention(**call), dk.disentangled_attention(**expected))
    dk.reset_stats()


def test_values_of_device_tensors_are_not_read():
    call = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in packed().items()}
    assert dk.disentangled_attention_varlen(**call).shape == (12, H, D)
    assert notices.stats()["calls"]["torch"] == 0
