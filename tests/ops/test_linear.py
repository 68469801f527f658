"""The products of linear layers: as exact as PyTorch's in every way there is, and only for what they suit."""

import pytest
import torch
from torch import nn

from deberta_kernels import env, native
from deberta_kernels.linear import products
from deberta_kernels.linear.layers import apply_linear, apply_linear_gelu
from deberta_kernels.proof.budget import MEAN_FACTOR, allowance
from tests import needs

needs.native_library()
STATUS = native.library_status()
ISAS = STATUS["variants"]
NARROW_ISAS = [isa for isa in ISAS if env.multiplies_bfloat16(isa)]
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


def errors(found, truth):
    error = (found.double() - truth).abs()
    return float(error.max()), float(error.mean())


def assert_exact(name, calls):
    """Each of (found, PyTorch's, truth): the mean over all calls no worse than PyTorch's, nor the largest error."""
    ours, theirs, sizes = [], [], []
    for found, eager, truth in calls:
        assert found.dtype == eager.dtype
        ours.append(errors(found, truth))
        theirs.append(errors(eager, truth))
        sizes.append(float(truth.abs().max()))
    dtype = calls[0][0].dtype
    assert max(e[0] for e in ours) <= allowance(dtype, max(e[0] for e in theirs), max(sizes)), name
    # A last rounding may fall either way, but there is no other floor.
    allowed = MEAN_FACTOR * sum(e[1] for e in theirs) + 1e-9 * max(sizes)
    assert sum(e[1] for e in ours) <= allowed, name


# The longest sums of all sizes of DeBERTa, and lengths around the parts in which they are made.
SHAPES = [(16, 8), (64, 40), (130, 100), (256, 64), (288, 200), (514, 50), (768, 8), (768, 500), (1024, 64)]
SHAPES += [(1536, 33), (3072, 16), (3072, 1024), (6144, 130)]
# Few tokens: of blocks that are full, and that are not; the first number that is not few.
SHAPES += [(64, 1), (768, 6), (800, 7), (1600, 11), (3072, 19), (768, 24), (768, 25)]


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("inputs", "tokens"), SHAPES)
def test_is_as_exact_as_pytorch(dtype, inputs, tokens, gelu):
    calls = []
    for seed in range(max(2, 600 // tokens)):
        torch.manual_seed(seed)
        layer, x = nn.Linear(inputs, 48).to(dtype).requires_grad_(False), torch.randn(tokens, inputs).to(dtype)
        found, eager = natively(layer, x, gelu), layer(x)
        truth = layer.double()(x.double())
        if gelu:
            truth, eager = nn.functional.gelu(truth), nn.functional.gelu(eager)
        calls.append((found, eager, truth))
    assert_exact("y", calls)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("inputs", "tokens"), [(64, 130), (288, 200), (768, 64), (768, 520), (3072, 300)])
def test_gradients_are_as_exact_as_pytorchs(isa, inputs, tokens):
    """Sums over the outputs and, of the weight's gradient, over the tokens."""
    calls = {"dx": [], "dweight": []}
    for seed in range(3):
        torch.manual_seed(seed)
        x, weight, dout = torch.randn(tokens, inputs), torch.randn(768, inputs) * 0.05, torch.randn(tokens, 768)
        with native.use_isa(isa):
            found = gradients(products.natively_with_gradients, x, weight, dout)
        eager = gradients(nn.functional.linear, x, weight, dout)
        truth = gradients(nn.functional.linear, x.double(), weight.double(), dout.double())
        for name, three in zip(calls, zip(found, eager, truth)):
            calls[name].append(three)
    for name, of_name in calls.items():
        assert_exact(name, of_name)


def gradients(linear, x, weight, dout):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(linear(x, weight, None), (x, weight), dout)


def widened_in_bfloat16(x, weight, bias):
    return products.widened_with_gradients(x, weight, bias, torch.bfloat16)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [(kind, dtype) for kind in ("plain", "gelu", "train") for dtype in DTYPES]
KINDS += [("autocast", dtype) for dtype in DTYPES[1:]]


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("wish", ["auto", True], ids=str)
@pytest.mark.parametrize("inputs", [64, 288, 768, 3072])
def test_whatever_is_chosen_is_as_exact_as_pytorch(inputs, kind, wish, dtype):
    """What this processor, dtype, number of tokens and option lead to, be it native, widened or PyTorch's own."""
    for tokens in (7, 8, 64, 200, 1024):
        calls = []
        for seed in range(max(1, 400 // tokens)):
            torch.manual_seed(seed)
            layer, x = nn.Linear(inputs, 64).train(kind == "train"), torch.randn(tokens, inputs)
            found, eager, truth = outcomes(layer, x, kind, wish is True, dtype)
            calls += zip(found, eager, truth)
        names = ("y", "dx", "dweight", "dbias") if kind == "train" else ("y",)
        for number, name in enumerate(names):
            assert_exact(f"{name} of {tokens} tokens", calls[number :: len(names)])


def outcomes(layer, x, kind, everywhere, dtype):
    """Return the results of a layer computed by this package, by PyTorch, and in float64."""
    if kind != "autocast":
        layer, x = layer.to(dtype), x.to(dtype)
    act = nn.GELU()

    def ours(x):
        if kind == "gelu":
            return apply_linear_gelu(layer, act, x, everywhere)
        return apply_linear(layer, x, everywhere)

    def eager(x):
        return act(layer(x)) if kind == "gelu" else layer(x)

    if kind == "train":
        x.requires_grad_()
        dout = torch.randn(*x.shape[:-1], layer.out_features).to(dtype)

        def trained(call, x, dout):
            y = call(x)
            return (y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), dout))

        found, expected = trained(ours, x, dout), trained(eager, x, dout)
        layer.double()
        return found, expected, trained(layer, x.detach().double().requires_grad_(), dout.double())
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=kind == "autocast"):
        found, expected = ours(x), eager(x)
    layer.double()
    with torch.no_grad():
        return (found,), (expected,), (eager(x.double()),)


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


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_threads_change_no_bit(dtype, tokens):
    layer, x = layer_of(96, 160, dtype), torch.randn(tokens, 96).to(dtype)
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


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 4.0])
def test_gelu_is_as_exact_as_pytorchs(dtype, scale):
    torch.manual_seed(0)
    x = (scale * torch.randn(16 * 4000)).to(dtype)
    layer = nn.Linear(2, x.numel()).to(dtype).requires_grad_(False)
    layer.weight.zero_()
    layer.bias.copy_(x)
    found, truth = natively(layer, torch.ones(1, 2, dtype=dtype), gelu=True)[0], nn.functional.gelu(x.double())
    assert_exact("gelu", [(found, nn.functional.gelu(x), truth)])


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
        assert not products.suits(x, weight, None, everywhere)


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


def test_any_number_of_tokens_is_taken(monkeypatch):
    weight = torch.ones(16, 32)
    wanted = STATUS["isa"] not in (None, "generic")
    for everywhere, wishes in ((False, True), (True, False)):
        monkeypatch.setattr(products, "_native_wanted", lambda wishes=wishes: wishes)
        for tokens in (1, 8, 5000):
            assert products.suits(torch.ones(1, tokens, 32), weight, None, everywhere) == wanted
    assert not products.suits(torch.ones(16, 32), weight)


def test_rows_of_any_strides_are_taken(dtype):
    layer, x = layer_of(32, 16, dtype), torch.randn(32, 9, 2).to(dtype)
    assert torch.equal(natively(layer, x.permute(2, 1, 0)), natively(layer, x.permute(2, 1, 0).contiguous()))
    row = x[:, :1, 0].t()
    assert torch.equal(natively(layer, row.expand(11, 32)), natively(layer, row.repeat(11, 1)))


@pytest.mark.parametrize(("most", "tokens"), [(577, 192), (577, 193), (577, 400), (577, 577), (6, 1), (6, 3), (6, 5)])
def test_the_number_of_tokens_changes_no_bit(dtype, most, tokens):
    """However many there are of many, or of few, in whatever blocks they are computed, and on however many threads."""
    inputs = 1600 if most < 10 else 300
    layer, x = layer_of(inputs, 80, dtype), torch.randn(most, inputs).to(dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found += [natively(layer, x)[:tokens], natively(layer, x[:tokens])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


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


@pytest.mark.parametrize("call", [products.natively_with_gradients, widened_in_bfloat16], ids=["native", "widened"])
@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("rows", [0, 1, 64, None])
@pytest.mark.parametrize("trained", ["both", "other"])
def test_data_exchanged_before_the_backward_is_not_what_it_reads(call, name, rows, trained):
    """The gradients belong to the memory of the forward, whatever its tensors hold by then, and of whatever size."""
    both = {"x": torch.randn(64, 32), "weight": torch.randn(16, 32)}
    for other, leaf in both.items():
        leaf.requires_grad_(trained == "both" or other != name)
    leaves = [leaf for leaf in both.values() if leaf.requires_grad]
    want = torch.autograd.grad(call(both["x"], both["weight"], None).sum(), leaves)
    result = call(both["x"], both["weight"], None)
    before = both[name].data
    both[name].data = torch.randn(both[name].shape if rows is None else (rows, 32))
    if trained == "both" and rows is not None and rows != len(before):
        # Autograd compares the gradient of an exchanged leaf with what the leaf is now.
        leaves = [leaf for leaf in leaves if leaf is not both[name]]
        want = [gradient for leaf, gradient in zip(both.values(), want) if leaf is not both[name]]
    assert all(map(torch.equal, want, torch.autograd.grad(result.sum(), leaves)))


@pytest.mark.parametrize("call", [products.natively_with_gradients, widened_in_bfloat16], ids=["native", "widened"])
@pytest.mark.parametrize("name", ["x", "weight"])
def test_changes_in_place_before_the_backward_are_refused(call, name):
    both = {"x": torch.randn(64, 32, requires_grad=True), "weight": torch.randn(16, 32, requires_grad=True)}
    result = call(both["x"], both["weight"], None)
    with torch.no_grad():
        both[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_saved_tensors_of_other_shapes_are_left_to_pytorch(monkeypatch):
    """Hooks on saved tensors may return anything."""
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved[:1]):
        result = products.natively_with_gradients(x, weight, None)
    monkeypatch.setattr(products, "_multiply", lambda *_, **__: pytest.fail("memory was read that is not there"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        result.sum().backward()


@pytest.mark.parametrize("shape", [(0, 32), (32, 0), (0, 0)])
def test_layers_without_inputs_or_outputs_are_left_to_pytorch(shape):
    layer, x = nn.Linear(shape[1], shape[0]), torch.randn(64, shape[1])
    assert not products.suits(x, layer.weight, layer.bias, everywhere=True)
    for mode in (True, False):
        found = apply_linear(layer.train(mode), x, everywhere=True)
        assert torch.equal(found, layer(x))


def test_no_tokens_are_no_work_for_the_library(dtype):
    layer = layer_of(32, 16, dtype)
    assert natively(layer, torch.ones(0, 32, dtype=dtype)).shape == (0, 16)
    anything = layer.weight.data_ptr()
    params = native.LinearParams(
        abi_version=native.ABI_VERSION, tokens=0, in_features=32, out_features=16, dtype=native.DTYPES[dtype],
        threads=1, x=anything, weight=anything, out=anything,
    )  # fmt: skip
    native.need().call("dk_cpu_linear", params)


def test_zeros_without_memory_are_left_to_pytorch():
    layer, x = nn.Linear(32, 16), torch.randn(64, 32, requires_grad=True)
    zeros = torch._efficientzerotensor((64, 32))
    with torch.no_grad():
        assert torch.equal(apply_linear(layer.eval(), zeros, everywhere=True), layer(torch.zeros(64, 32)))
    result = products.natively_with_gradients(x, layer.weight, layer.bias)
    for gradient in torch.autograd.grad(result, (x, layer.weight), torch._efficientzerotensor((64, 16))):
        assert not gradient.any()
