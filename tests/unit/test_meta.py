"""The meta device: shapes, dtypes and strides of every call, forward and backward, without values."""

import pytest
import torch

import deberta_kernels as dk

B, H, N, D = 2, 3, 7, 8
SETTINGS = {"position_buckets": 8, "max_relative_positions": 16}


def same_form(a, b, strides=True):
    return b.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype) and (not strides or a.stride() == b.stride())


def compare(run, *tensors, name):
    """Run on the CPU and on meta tensors of the same form -> results of the same form."""
    strides = name != "reference"  # whose gradients autograd lays out
    real = [x.requires_grad_(x.is_floating_point()) for x in tensors]
    shapes = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in tensors]
    for given in (real, shapes):
        given.extend(
            torch.autograd.grad(sum(x.float().sum() for x in run(*given)), [x for x in given if x.requires_grad])
        )
    assert all(same_form(a, b, strides) for a, b in zip(real[len(tensors) :], shapes[len(tensors) :], strict=True))
    assert all(map(same_form, run(*real[: len(tensors)]), run(*shapes[: len(tensors)])))


@pytest.mark.parametrize("name", ["auto", "torch", "reference", "cpu"])
@pytest.mark.parametrize("mask", ["none", "key", "integers", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(name, mask, dtype):
    if dk.explain(*(torch.ones(B, H, N, D, dtype=dtype),) * 3, backend=name).chosen is None:
        pytest.skip(f"no backend {name!r} here")
    x = [torch.randn(B, H, N, D, dtype=dtype) for _ in range(3)] + [torch.randn(H, 16, D, dtype=dtype)] * 2
    given = {"none": None, "key": torch.ones(B, N) > 0, "integers": torch.ones(B, N).long()}.get(
        mask, torch.ones(B, 1, N, N) > 0
    )

    def run(q, *more):
        here = None if given is None else given.to(q.device)
        return dk.disentangled_attention(
            q, *more, attention_mask=here, dropout_p=0.1, return_lse=True, **SETTINGS, backend=name
        )

    compare(run, *x, name=name)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_packed_sequences(name):
    x = [torch.randn(12, H, D) for _ in range(3)] + [torch.randn(H, 16, D) for _ in range(2)]
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)

    def run(q, *more):
        return dk.disentangled_attention_varlen(
            q, *more, cu_seqlens=bounds.to(q.device), max_seqlen=7, return_lse=True, **SETTINGS, backend=name
        )

    compare(run, *x, name=name)
