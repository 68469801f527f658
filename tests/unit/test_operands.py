"""The operators get whatever an exported program holds: they refuse by name what a kernel would trip over."""

import re

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import deberta_kernels as dk
from deberta_kernels import api
from deberta_kernels.checks import packed as packed_checks
from deberta_kernels.checks.arguments import storage_fits
from deberta_kernels.checks.operands import check_storages
from deberta_kernels.types import AttentionProblem, Masks, PositionSpec

N, HEADS, D = 40, 3, 8
SHAPE = (2, HEADS, N, D)
NAMES = [x.name for x in torch.ops.deberta_kernels.attention.default._schema.arguments]


def good(**changes):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    call = dict.fromkeys(NAMES) | {
        "q": draw(*SHAPE), "k": draw(*SHAPE), "v": draw(*SHAPE), "pos_key": draw(HEADS, 16, D),
        "pos_query": draw(HEADS, 16, D), "max_seqlen": N, "position_buckets": 8, "max_relative_positions": 16,
        "first_row": 0, "prefix_length": 0, "scale": 0.2, "dropout_p": 0.0, "backend": "torch",
    }  # fmt: skip
    return call | changes


def packed(**changes):
    call = {name: torch.randn(1, HEADS, N, D) for name in "qkv"} | {"cu_seqlens": int32(0, 9, N)}
    return good(**(call | changes))


def forward(**call):
    return torch.ops.deberta_kernels.attention(*(call[name] for name in NAMES))


def backward(call, **changes):
    lse = torch.zeros(call["q"].shape[:3])
    results = {"dout": call["q"], "dlse": None, "out": call["q"], "lse": lse, "needs": [True] * 5}
    results |= changes
    dout, dlse, out, lse, needs = results.values()
    return torch.ops.deberta_kernels.attention_backward(dout, dlse, out, lse, *(call[n] for n in NAMES), needs)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def ones(*shape, dtype=torch.bool):
    return torch.ones(shape, dtype=dtype)


def freed(x, left=0):
    x = x.clone()
    x.untyped_storage().resize_(left)
    return x


FIXED = {
    "v of one key": ({"v": torch.ones(2, HEADS, 1, D)}, ValueError, "v must have the shape of k"),
    "k of one head": ({"k": torch.ones(2, 1, N, D)}, ValueError, "k must have shape (B, H, Nk, D) = (2, 3, Nk, 8)"),
    "narrow k": ({"k": torch.ones(2, HEADS, N, 4)}, ValueError, "k must have shape (B, H, Nk, D)"),
    "half k": ({"k": torch.ones(SHAPE).half()}, TypeError, "k must have the dtype of q, float32, got float16"),
    "k elsewhere": ({"k": torch.ones(SHAPE, device="meta")}, ValueError, "k must be on the device of q, cpu, got meta"),
    "q of three dimensions": ({"q": torch.ones(SHAPE[1:])}, ValueError, "q must have shape (B, H, N, D), got (3,"),
    "sparse q": ({"q": torch.ones(SHAPE).to_sparse()}, TypeError, "q must be a dense tensor, got layout sparse_coo"),
    "table of one head": ({"pos_key": torch.ones(1, 16, D)}, ValueError, "pos_key must have shape (H, 2*att_span, D)"),
    "low tables": (
        {"pos_key": torch.ones(HEADS, 3, D), "pos_query": torch.ones(HEADS, 3, D)},
        ValueError,
        "must hold the rows [0, 16)",
    ),
    "unequal tables": ({"pos_query": torch.ones(HEADS, 15, D)}, ValueError, "pos_query must have as many rows"),
    "first_row": ({"first_row": 2**40}, ValueError, "first_row and the height of the tables must stay inside"),
    "prefix_length": ({"prefix_length": N + 1}, ValueError, "prefix_length must be between 0 and the number of keys"),
    "one bucket": ({"position_buckets": 1}, ValueError, "position_buckets must be at least 2"),
    "key mask": ({"key_mask": ones(1, 1)}, ValueError, "masks.key must have shape (2, 40), got (1, 1)"),
    "query mask": ({"query_mask": ones(2, 1)}, ValueError, "masks.query must have shape (2, 40)"),
    "pair mask": ({"pair_mask": ones(1, 1, 1, 1)}, ValueError, "masks.pair must have shape (2, 1, 40, 40) or"),
    "float mask": ({"key_mask": torch.ones(2, N)}, TypeError, "masks.key must have dtype bool"),
    "no seed": ({"dropout_p": 0.1}, ValueError, "seed must be given when dropout_p is not 0, got None"),
    "long seed": ({"dropout_p": 0.1, "seed": ones(2, dtype=torch.int64)}, ValueError, "seed must have shape (1,), got"),
    "float seed": ({"dropout_p": 0.1, "seed": torch.ones(1)}, TypeError, "seed must have dtype int64"),
    "dropout": ({"dropout_p": 1.0, "seed": ones(1, dtype=torch.int64)}, ValueError, "dropout_p must be in [0, 1)"),
    "scale": ({"scale": 0.0}, ValueError, "scale must be a positive number, normal in float32"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of"),
    "freed q": ({"q": freed(torch.ones(SHAPE))}, ValueError, "q must have a storage of at least 7680 bytes for shape"),
    "cut table": ({"pos_query": freed(torch.ones(HEADS, 16, D), 64)}, ValueError, "pos_query must have a storage of"),
    "freed mask": ({"key_mask": freed(ones(2, N))}, ValueError, "masks.key must have a storage of at least 80 bytes"),
}  # fmt: skip

PACKED = {
    "past the end": ({"cu_seqlens": int32(0, 10**9)}, ValueError, "cu_seqlens must end at T = 40"),
    "past the end in a parameter": (
        {"cu_seqlens": torch.nn.Parameter(int32(0, 10**9), requires_grad=False)},
        ValueError,
        "cu_seqlens must end at T = 40",
    ),
    "falling": ({"cu_seqlens": int32(0, 50, N)}, ValueError, "cu_seqlens must not fall"),
    "freed": ({"cu_seqlens": freed(int32(0, N))}, ValueError, "cu_seqlens must have a storage of at least 8 bytes"),
    "two rows": ({name: torch.ones(SHAPE) for name in "qkv"}, ValueError, "q and k must have shape (1, H, T, D)"),
    "prefix": ({"prefix_length": 1}, ValueError, "prefix_length must be 0 with cu_seqlens"),
    "bound": ({"max_seqlen": 30}, ValueError, "max_seqlen must be at least 31"),
    "mask": ({"key_mask": ones(1, N)}, ValueError, "masks.key must be None with cu_seqlens"),
}

RESULTS = {
    "short dout": ({"dout": torch.ones(2, HEADS, 1, D)}, ValueError, "dout must have shape (2, 3, 40, 8), got"),
    "double dout": ({"dout": torch.ones(SHAPE).double()}, TypeError, "dout must have dtype torch.float32, got"),
    "short out": ({"out": torch.ones(2, HEADS, 1, D)}, ValueError, "out must have shape (2, 3, 40, 8), got"),
    "short lse": ({"lse": torch.ones(2, HEADS, 1)}, ValueError, "lse must have shape (2, 3, 40), got (2, 3, 1)"),
    "double lse": ({"lse": torch.ones(2, HEADS, N).double()}, TypeError, "lse must have dtype torch.float32, got"),
    "short dlse": ({"dlse": torch.ones(2, HEADS, 1)}, ValueError, "dlse must have shape (2, 3, 40), got (2, 3, 1)"),
    "four needs": ({"needs": [True] * 4}, ValueError, "needs must say for q, k, v, pos_key and pos_query"),
    "freed dout": ({"dout": freed(torch.ones(SHAPE))}, ValueError, "dout must have a storage of at least 7680 bytes"),
    "cut lse": (
        {"lse": freed(torch.ones(2, HEADS, N), 8)},
        ValueError,
        "lse must have a storage of at least 960 bytes",
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_both_operators_name_a_bad_argument(name):
    changes, kind, text = FIXED[name]
    results = {"dout": torch.ones(SHAPE), "out": torch.ones(SHAPE)}
    for call in (lambda: forward(**good(**changes)), lambda: backward(good(**changes), **results)):
        with pytest.raises(kind, match=re.escape(text)):
            call()


@pytest.mark.parametrize("name", PACKED)
def test_both_operators_name_bad_bounds(name):
    changes, kind, text = PACKED[name]
    for run in (lambda: forward(**packed(**changes)), lambda: backward(packed(**changes))):
        with pytest.raises(kind, match=re.escape(text)):
            run()


@pytest.mark.parametrize("name", RESULTS)
def test_the_backward_names_a_bad_result(name):
    changes, kind, text = RESULTS[name]
    with pytest.raises(kind, match=re.escape(text)):
        backward(good(), **changes)


@pytest.mark.parametrize("name", ["v of one key", "key mask", "low tables", "scale"])
def test_shapes_are_checked_without_values_too(name):
    changes, kind, text = FIXED[name]
    call = {k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in good(**changes).items()}
    if name == "low tables":  # whose rows are looked up when something runs
        assert forward(**call)[0].shape == SHAPE
        return
    with pytest.raises(kind, match=re.escape(text)):
        forward(**call)


def test_the_backward_of_a_named_backend_refuses_what_its_forward_refuses():
    wide = {name: torch.ones(1, 1, 4, 300) for name in "qkv"}
    call = good(**wide, pos_key=None, pos_query=None, backend="cpu")
    for run in (lambda: forward(**call), lambda: backward(call)):
        with pytest.raises(NotImplementedError, match="backend='cpu' cannot run this call"):
            run()


def test_lse_of_any_strides_is_read_as_its_values(backend):
    call = good(backend=backend)
    out, lse = forward(**call)
    want = backward(call, out=out, lse=lse)
    spread = torch.stack([lse, torch.full_like(lse, 9.0)], -1)[..., 0]
    across = lse.transpose(0, 2).contiguous().transpose(0, 2)
    for other in (spread, across):
        assert all(map(torch.equal, want, backward(call, out=out, lse=other)))
    dlse = torch.tensor(0.5).expand(lse.shape)
    for a, b in zip(backward(call, out=out, lse=lse, dlse=dlse), backward(call, out=out, lse=lse, dlse=dlse.clone())):
        assert torch.equal(a, b)


def test_prepared_tables_with_gaps_are_refused():
    if dk.explain(*(torch.ones(SHAPE),) * 3, backend="cpu").chosen is None:
        pytest.skip("no native library")
    call = good(backend="cpu")
    from deberta_kernels.impl import cpu

    prepared = cpu.prepare(call["pos_key"], call["pos_query"], PositionSpec(8, 16))
    assert torch.equal(forward(**call | {"prepared": prepared})[0], forward(**call)[0])
    for other in (prepared[:1].expand(prepared.shape), prepared.repeat(2)[::2], prepared[:-1], prepared.view(2, -1)):
        with pytest.raises(ValueError, match="prepared must be what prepare returned for these tables, uint8 of"):
            forward(**call | {"prepared": other})


def test_storage_fits_looks_at_sizes_strides_and_offset():
    x = torch.arange(24.0).view(4, 6)
    views = [x, x.t(), x[:3], x[:, :5], x[3:], x[:, 5:], x[4:], x[:0], x[1, 2].expand(7, 9)]
    assert all(map(storage_fits, views))
    assert not storage_fits(torch._efficientzerotensor((4, 6)))
    assert storage_fits(torch._efficientzerotensor((0, 6)))
    x.untyped_storage().resize_(95)  # a byte less
    assert [storage_fits(view) for view in views] == [False, False, True, True, False, False, True, True, True]
    x.untyped_storage().resize_(0)
    assert [storage_fits(view) for view in views] == [False] * 6 + [True, True, False]
    assert storage_fits(torch.ones(3, device="meta"))
    assert storage_fits(torch.ones(3, 3).to_sparse())


@pytest.mark.parametrize("name", ["q", "k", "v", "pos_key", "pos_query", "key", "query", "pair", "seed", "prepared"])
def test_every_tensor_of_a_problem_is_looked_at(name):
    tensors = {n: torch.ones(4, 4) for n in ("q", "k", "v", "pos_key", "pos_query", "seed", "prepared")}
    masks = {n: torch.ones(4, 4) for n in ("key", "query", "pair")}
    (masks if name in masks else tensors)[name].untyped_storage().resize_(0)
    problem = AttentionProblem(masks=Masks(**masks), position=PositionSpec(), scale=1.0, **tensors)
    with pytest.raises(
        ValueError, match=rf"^(masks\.)?{name} must have a storage of at least 64 bytes for shape .*got 0"
    ):
        check_storages(problem)


def leaves(grad=True):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator, requires_grad=grad)  # noqa: E731
    return [draw(*SHAPE) for _ in range(3)] + [draw(HEADS, 16, D) for _ in range(2)]


SETTINGS = {"position_buckets": 8, "max_relative_positions": 16}


@pytest.mark.parametrize(("index", "name"), list(enumerate(["q", "k", "v", "pos_key", "pos_query"])))
def test_memory_that_is_freed_is_named_in_forward_and_backward(backend, index, name):
    x = leaves(grad=False)
    x[index] = freed(x[index], 64)
    with pytest.raises(ValueError, match=rf"^{name} must have a storage of"):
        dk.disentangled_attention(*x, **SETTINGS, backend=backend)
    x = leaves()
    out = dk.disentangled_attention(*x, **SETTINGS, backend=backend)
    x[index].data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"^{name} must have a storage of"):
        out.backward(torch.ones(SHAPE))


def test_what_changed_since_the_forward_is_checked_again(backend):
    mask = ones(2, N)
    for change in (
        lambda x: setattr(x[1], "data", x[1].data[:, :1]),
        lambda x: setattr(x[2], "data", x[2].data.double()),
        lambda x: setattr(x[3], "data", x[3].data[:, :2]),
        lambda x: setattr(mask, "data", mask[:1]),
    ):
        x = leaves()
        out = api.run_attention(*x, masks=Masks(key=mask), position=PositionSpec(8, 16), backend=backend)
        change(x)
        with pytest.raises((TypeError, ValueError), match=r" must "):
            out.backward(torch.ones(SHAPE))


def sequences(cu_seqlens, x, backend, max_seqlen=31):
    return dk.disentangled_attention_varlen(
        *x, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **SETTINGS, backend=backend
    )


@pytest.mark.parametrize("route", ["eager", "operator", "functional"])
@pytest.mark.parametrize("other", [2_000_000_000, 12])
def test_gradients_belong_to_the_bounds_of_the_forward(backend, route, other):
    """A NumPy buffer that is used again changes them without a trace; in-place operations may too."""
    x = [torch.randn(N, HEADS, D, requires_grad=route != "functional") for _ in range(3)]
    bounds = int32(0, 9, N)
    if route == "functional":
        out, pull = torch.func.vjp(lambda *x: sequences(bounds, x, backend), *x)
        gradients = lambda: pull(out)  # noqa: E731
    else:
        activities = [ProfilerActivity.CPU]
        if route == "operator":  # a profiler watches
            with profile(activities=activities):
                out = sequences(bounds, x, backend)
        else:
            out = sequences(bounds, x, backend)
        gradients = lambda: torch.autograd.grad(out.square().sum(), x, retain_graph=True)  # noqa: E731
    want = gradients()
    memory = bounds.numpy()
    memory[1] = other
    assert all(map(torch.equal, want, gradients()))
    assert isinstance(memory, np.ndarray)


def test_the_operator_keeps_bounds_of_its_own(backend):
    q = torch.randn(1, HEADS, N, D, requires_grad=True)
    call = packed(q=q, backend=backend)
    out, _ = forward(**call)
    want = torch.autograd.grad(out.square().sum(), q, retain_graph=True)
    call["cu_seqlens"].numpy()[1] = 12
    assert torch.equal(*want, *torch.autograd.grad(out.square().sum(), q))


def test_bounds_are_copied_before_they_are_checked(monkeypatch, backend):
    """Another thread writes between the check and the kernel."""
    bounds = int32(0, 9, N)
    x = [torch.randn(N, HEADS, D) for _ in range(3)]
    want = sequences(bounds, x, backend)
    check = packed_checks._check_bounds

    def then_write(*arguments):
        longest = check(*arguments)
        bounds[1] = 2_000_000_000
        return longest

    monkeypatch.setattr(packed_checks, "_check_bounds", then_write)
    assert torch.equal(sequences(bounds, x, backend), want)


@pytest.mark.parametrize("bound", [10**8, 2**40, 2**63, 2**80])
def test_max_seqlen_costs_nothing(backend, bound):
    x = [torch.randn(N, HEADS, D) for _ in range(3)] + [torch.randn(HEADS, 16, D) for _ in range(2)]
    want = sequences(int32(0, 9, N), x, backend)
    assert torch.equal(sequences(int32(0, 9, N), x, backend, bound), want)
    assert torch.equal(sequences(int32(0, 9, N), x, "reference", bound), sequences(int32(0, 9, N), x, "reference"))
    if bound < 2**63:  # an operator takes 64 bits
        problem = packed(backend=backend, max_seqlen=bound)
        assert torch.equal(forward(**problem)[0], forward(**problem | {"max_seqlen": N})[0])


def test_max_seqlen_is_cut_to_the_tokens_where_bounds_are_not_read():
    x = torch.ones(1, HEADS, N, D, device="meta")
    bounds = torch.ones(3, dtype=torch.int32, device="meta")
    assert packed_checks.check_cu_seqlens(bounds, x, N, 2**70) == (bounds, N)


@pytest.mark.parametrize("argument", ["q", "k", "v", "pos_key", "pos_query", "attention_mask"])
@pytest.mark.parametrize("kind", ["sparse", "mkldnn", "nested", "jagged"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_other_layouts_are_named(argument, kind):
    call = dict(zip(("q", "k", "v", "pos_key", "pos_query"), leaves(grad=False))) | {"attention_mask": torch.ones(2, N)}
    x = call[argument]
    change = {
        "sparse": torch.Tensor.to_sparse, "mkldnn": torch.Tensor.to_mkldnn,
        "nested": lambda x: torch.nested.nested_tensor(list(x)),
        "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    }[kind]  # fmt: skip
    call[argument] = change(x)
    for function in (dk.disentangled_attention, dk.explain):
        with pytest.raises(TypeError, match=rf"^{argument} must be a dense tensor, got (layout|a nested one)"):
            function(**call, **SETTINGS)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_other_layouts_are_named_in_packed_calls():
    x = torch.ones(N, HEADS, D)
    for name, other in (("q", x.to_sparse()), ("v", x.to_mkldnn()), ("k", torch.nested.nested_tensor([x[:9], x[9:]]))):
        with pytest.raises(TypeError, match=rf"^{name} must be a dense tensor"):
            dk.disentangled_attention_varlen(
                **({"q": x, "k": x, "v": x} | {name: other}), cu_seqlens=int32(0, N), max_seqlen=N
            )
    with pytest.raises(TypeError, match=r"^cu_seqlens must be a dense tensor, got layout sparse_coo"):
        dk.disentangled_attention_varlen(x, x, x, cu_seqlens=int32(0, N).to_sparse(), max_seqlen=N)


def test_tensors_without_memory_are_refused_by_native_code():
    if dk.explain(*(torch.ones(SHAPE),) * 3, backend="cpu").chosen is None:
        pytest.skip("no native library")
    from deberta_kernels.impl import cpu

    zeros, x = torch._efficientzerotensor(SHAPE), torch.ones(SHAPE)
    for backend in ("torch", "cpu", "reference"):
        with pytest.raises(ValueError, match=r"^v must have memory, got a ZeroTensor, .*; pass v.clone\(\)\.$"):
            dk.disentangled_attention(x, x, zeros, backend=backend)
    problem = AttentionProblem(zeros, x, x, None, None, Masks(), PositionSpec(8, 16), 0.2, max_seqlen=N)
    with pytest.raises(ValueError, match=r"^q must have memory, got a ZeroTensor"):
        cpu.forward(problem)
    problem = problem.changed(q=x)
    out, lse = cpu.forward(problem)
    with pytest.raises(ValueError, match="must have memory, got none"):
        cpu.backward(problem, zeros, None, out, lse, (True,) * 5)


@pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
def test_a_gradient_of_zeros_without_memory_is_zeros(backend):
    if dk.explain(*(torch.ones(SHAPE),) * 3, backend=backend).chosen is None:
        pytest.skip("no native library")
    x = [torch.randn(SHAPE, requires_grad=True) for _ in range(3)]
    results = dk.disentangled_attention(*x, backend=backend, return_lse=True)
    nothing = [torch._efficientzerotensor(result.shape) for result in results]
    for gradient in torch.autograd.grad(results, x, nothing):
        assert torch.equal(gradient, torch.zeros(SHAPE))
