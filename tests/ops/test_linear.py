"""The native library's linear layer: as exact as PyTorch's in every variant, and only for what it suits."""

import pytest
import torch
from torch import nn

from deberta_kernels import native
from deberta_kernels.modules import products
from deberta_kernels.modules.linear import apply_linear
from tests import needs

needs.native_library()
STATUS = native.library_status()
ISAS = STATUS["variants"]
NARROW_ISAS = [isa for isa in ISAS if isa == "avx512_bf16"]
WAYS = [(isa, torch.float32) for isa in ISAS] + [(isa, torch.bfloat16) for isa in NARROW_ISAS]


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def dtype(request):
    """Run every variant with every dtype it multiplies."""
    isa, dtype = request.param
    with native.use_isa(isa):
        yield dtype


def layer_of(inputs, outputs, dtype, bias=True):
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def natively(layer, x, gelu=False):
    return products.natively(x, layer.weight, layer.bias, gelu)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [
        (1, 2, 16),
        (16, 64, 48),
        (17, 250, 32),
        (33, 256, 80),
        (100, 256, 256),
        (64, 512, 256),
        (50, 514, 16),
        (130, 768, 256),
        (41, 1030, 16),
    ],
)
def test_is_as_exact_as_pytorch(dtype, tokens, inputs, outputs, gelu):
    ours, eagers, sizes = [], [], []
    for seed in range(6):
        torch.manual_seed(seed)
        layer, x = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False), torch.randn(tokens, inputs).to(dtype)
        found, eager = natively(layer, x, gelu), layer(x)
        truth = layer.double()(x.double())
        if gelu:
            truth, eager = nn.functional.gelu(truth), nn.functional.gelu(eager)
        assert found.dtype == dtype
        ours.append((found.double() - truth).abs().flatten())
        eagers.append((eager.double() - truth).abs().flatten())
        sizes.append(float(truth.abs().max()))
    error, allowed = torch.cat(ours), torch.cat(eagers)
    # A quarter of a unit in the last place: the last rounding alone.
    floor = torch.finfo(torch.float32).eps / 4 * max(sizes)
    assert error.max() <= 2 * (allowed.max() + floor)
    assert error.mean() <= 1.3 * (allowed.mean() + floor / 4)


def test_leading_dimensions_are_kept(dtype):
    layer, x = layer_of(32, 16, dtype), torch.randn(2, 3, 5, 32).to(dtype)
    assert natively(layer, x).shape == (2, 3, 5, 16)
    assert torch.equal(natively(layer, x), natively(layer, x.flatten(0, 2)).view(2, 3, 5, 16))


def test_a_layer_may_have_no_bias(dtype):
    layer, x = layer_of(32, 16, dtype, bias=False), torch.randn(9, 32).to(dtype)
    torch.testing.assert_close(natively(layer, x), layer(x))


def test_nothing_beside_the_result_is_written(dtype, monkeypatch):
    layer, x = layer_of(32, 16, dtype), torch.randn(19, 32).to(dtype)
    expected = natively(layer, x)
    memory = torch.full((21, 16), 7.0, dtype=dtype)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: memory[1:20])
    assert torch.equal(natively(layer, x), expected)
    assert (memory[[0, 20]] == 7).all()


def test_threads_change_no_bit(dtype):
    layer, x = layer_of(96, 160, dtype), torch.randn(70, 96).to(dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(natively(layer, x, gelu=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_token_does_not_depend_on_the_others(dtype):
    layer, x = layer_of(64, 32, dtype), torch.randn(40, 64).to(dtype)
    x[7] = float("nan")
    whole = natively(layer, x)
    assert whole[7].isnan().all()
    assert whole[[6, 8]].isfinite().all()
    x[7], x[8] = 0, 3e38
    assert torch.equal(natively(layer, x)[:7], whole[:7])


def test_gelu_follows_pytorch_everywhere(dtype):
    edges = [0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, float("inf"), -float("inf"), float("nan")]
    x = torch.cat([torch.linspace(-15, 15, 16 * 2000), torch.tensor([*edges, *[0.0] * 7])]).to(dtype)
    layer = layer_of(2, 16, dtype)
    layer.weight.zero_()
    ours, outputs = [], torch.zeros(1, 2, dtype=dtype)
    for bias in x.split(16):
        layer.bias.copy_(bias)
        ours.append(natively(layer, outputs, gelu=True)[0])
    found, expected = torch.cat(ours).double(), nn.functional.gelu(x.double())
    finite = expected.isfinite()
    # In double -inf gives NaN as well.
    assert torch.equal(found[~finite].nan_to_num(1, 2, 3), expected[~finite].nan_to_num(1, 2, 3))
    error, size = (found - expected)[finite].abs(), expected[finite].abs()
    # A unit in the last place of the result, and of 1 + erf(x); instructions for bfloat16 take subnormals for zero.
    allowed = size * torch.finfo(dtype).eps + 1.2e-7 * x[finite].double().abs().clamp(max=15) + 1e-38
    assert (error <= allowed).all()


@pytest.mark.parametrize(
    ("outputs", "inputs", "kind"), [(24, 32, torch.float32), (16, 32, torch.float16), (16, 32, torch.float64)]
)
def test_what_does_not_suit_is_never_taken(outputs, inputs, kind, monkeypatch):
    monkeypatch.setattr(products, "_native_wanted", lambda: True)
    x, weight = torch.ones(32, inputs, dtype=kind), torch.ones(outputs, inputs, dtype=kind)
    for everywhere in (False, True):
        assert not products.suits_few_tokens(x, weight, None, everywhere)


WEIGHT, X = torch.randn(16, 32), torch.randn(20, 32)


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.randn(20, 48), WEIGHT, None),
        (torch.randn(20, 16), WEIGHT, None),
        (X, torch.randn(32), None),
        (X, WEIGHT, torch.randn(1)),
        (X, WEIGHT, torch.randn(20, 16)),
        (X, WEIGHT, torch.randn(8)),
        (X, WEIGHT, torch.tensor(2.0)),
        (X, WEIGHT, torch._neg_view(torch.randn(16))),
        (X, torch._neg_view(WEIGHT), None),
        (torch._neg_view(X), WEIGHT, None),
    ],
    ids=["wide", "narrow", "vector", "bias 1", "bias 20x16", "bias 8", "bias 0-d", "bias", "weight", "x"],
)
def test_odd_shapes_and_pending_negations_are_answered_as_before(x, weight, bias, monkeypatch):
    """Memory is all the library sees: PyTorch broadcasts, negates, or raises."""
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(products, "natively", lambda *tensors: taken.append(tensors[0]))
    layer = nn.Linear(32, 16, bias=False).requires_grad_(False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    layer.eval()
    found = []
    for call in (layer, lambda x: apply_linear(layer, x, everywhere=True)):
        try:
            found.append(call(x))
        except RuntimeError as error:
            found.append(type(error))
    if isinstance(found[0], torch.Tensor) and isinstance(found[1], torch.Tensor):
        torch.testing.assert_close(found[1], found[0])
    else:
        assert found[1] is found[0]
    assert taken == []


def test_few_tokens_are_those_that_a_library_is_slow_with(monkeypatch):
    weight = torch.ones(16, 32)
    wanted = STATUS["isa"] in products._VARIANTS
    for everywhere, wishes in ((False, True), (True, False)):
        monkeypatch.setattr(products, "_native_wanted", lambda wishes=wishes: wishes)
        for tokens, expected in (
            (products._FEWEST - 1, False),
            (products._FEWEST, wanted),
            (products._MOST, wanted),
            (products._MOST + 1, False),
        ):
            x = torch.ones(1, tokens, 32)
            assert products.suits_few_tokens(x, weight, None, everywhere) == expected
            assert not products.suits_few_tokens(x.transpose(0, 1).expand(tokens, 2, 32), weight, None, everywhere)
    assert not products.suits_few_tokens(torch.ones(16, 32), weight)


def test_other_makers_processors_keep_their_librarys_products(monkeypatch):
    for maker, expected in (("GenuineIntel", False), ("AuthenticAMD", True), (None, False)):
        products._native_wanted.cache_clear()
        monkeypatch.setattr(products, "vendor", lambda maker=maker: maker)
        assert products._native_wanted() == expected
    products._native_wanted.cache_clear()


def test_an_odd_number_of_outputs_is_refused_by_the_library():
    layer = layer_of(32, 24, torch.float32)
    with pytest.raises(RuntimeError, match="not in this instruction set"):
        natively(layer, torch.ones(3, 32))
