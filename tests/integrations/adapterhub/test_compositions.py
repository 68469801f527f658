"""Every composition of adapters, on the methods that support it: as without the patch, or the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import deberta_kernels as dk
from tests import needs

adapters = needs.package("adapters")
from tests.integrations.adapterhub.setups import COMPOSITIONS, PACKAGES

QKV = ["q", "k", "v"]
METHODS: dict[str, Any] = {
    "seq_bn": "seq_bn",
    "par_bn": "par_bn",
    "seq_bn_inv": "seq_bn_inv",
    "prefix_tuning": adapters.PrefixTuningConfig(prefix_length=7, flat=True),
    "prompt_tuning": adapters.PromptTuningConfig(prompt_length=6),
    "lora on v": adapters.LoRAConfig(attn_matrices=["v"]),
    "lora on q, k, v": adapters.LoRAConfig(attn_matrices=QKV),
    "ia3": "ia3",
    "mam": adapters.MAMConfig(adapters.PrefixTuningConfig(prefix_length=7, flat=True), adapters.ParBnConfig()),
}
NOT_POSSIBLE = "raises"


@pytest.fixture
def check(adapt, batch, results, in_float64, compare, calls_per_layer) -> Callable[..., str]:
    """Compare a composition with and without the patch; return what the table says of it."""

    def check(configs: dict[str, Any], setup: str, **settings: Any) -> str:
        inputs = batch(3, 29)

        def model(order: str | None = None) -> Any:
            made = adapt(configs, None, order, **settings)
            if setup == "Fuse":
                made.add_adapter_fusion(COMPOSITIONS[setup]("a", "b"))
            made.set_active_adapters(COMPOSITIONS[setup]("a", "b"))
            return made

        try:
            eager_model = model()
            eager = results(eager_model, inputs)
        except Exception as error:  # whatever AdapterHub raises, the fused model raises
            with pytest.raises(type(error)):
                results(model("adapters first"), inputs)
            return NOT_POSSIBLE
        truth = in_float64(eager_model, inputs)
        for order in ("adapters first", "patch_all first"):
            fused_model = model(order)
            dk.reset_stats()
            compare(results(fused_model, inputs), eager, truth)
            calls = calls_per_layer()
            dk.unpatch_all()
        return calls

    return check


# A cell that AdapterHub itself refuses runs none; `calls_per_layer` sees to the others.
@pytest.mark.no_kernels
@pytest.mark.parametrize("setup", COMPOSITIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared keys", "own keys"])
def test_every_composition_is_as_without_the_patch(method, setup, shared, check, tables):
    configs = {"a": METHODS[method], "b": METHODS[method]}
    seen = check(configs, setup, share_att_key=shared)
    row = f"{method}, {'shared' if shared else 'own'} keys"
    tables.report("adapterhub-compositions", PACKAGES, row, setup, seen)


def test_different_methods_stack(check):
    assert check({"a": METHODS["prefix_tuning"], "b": METHODS["seq_bn"]}, "Stack") == "2"


@pytest.mark.parametrize("setup", ["Parallel", "BatchSplit"])
def test_prefixes_of_different_lengths_compose(setup, check):
    longer = adapters.PrefixTuningConfig(prefix_length=11, flat=True)
    assert check({"a": METHODS["prefix_tuning"], "b": longer}, setup) == "2"


@pytest.mark.parametrize("setup", ["Stack", "BatchSplit"])
def test_composition_beside_the_convolution(setup, check):
    configs = {"a": METHODS["prefix_tuning"], "b": METHODS["prefix_tuning"]}
    assert check(configs, setup, conv_kernel_size=3) == "2"


# A cell that AdapterHub itself refuses runs none; `calls_per_layer` sees to the others.
@pytest.mark.no_kernels
def test_parallel_adapters_fail_beside_the_convolution_as_without_the_patch(check):
    assert check({"a": METHODS["seq_bn"], "b": METHODS["seq_bn"]}, "Parallel", conv_kernel_size=3) == NOT_POSSIBLE
