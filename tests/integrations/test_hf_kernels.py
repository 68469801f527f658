"""The kernel for Hugging Face's package `kernels`, put on encoders as transformers would, beside `patch` and alone."""

from __future__ import annotations

import copy
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.deberta_v2 import modeling_deberta_v2 as modeling

import deberta_kernels as dk
from deberta_kernels.testing import geometries
from tests import needs
from tests.checkout import ROOT
from tools import hf_kernel

kernels = needs.package("kernels")
# What runs is counted by the kernel's own copy of the package.
pytestmark = pytest.mark.no_kernels
LAYER = "DebertaV2Encoder"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "kernel"
    hf_kernel.write(folder)
    return folder


@pytest.fixture
def kernel(folder: Path) -> ModuleType:
    kernel = kernels.get_local_kernel(folder)
    kernel.reset_stats()
    return kernel


@pytest.fixture(autouse=True)
def decorated() -> Iterator[None]:
    """The encoder's class as it is with @use_kernel_forward_from_hub("DebertaV2Encoder") above it."""
    before = set(vars(modeling.DebertaV2Encoder))
    assert kernels.use_kernel_forward_from_hub(LAYER)(modeling.DebertaV2Encoder) is modeling.DebertaV2Encoder
    yield
    for name in set(vars(modeling.DebertaV2Encoder)) - before:
        delattr(modeling.DebertaV2Encoder, name)


@pytest.fixture
def kernelize(folder: Path) -> Callable[..., Any]:
    """Put the layer on a model's encoder: kernelize(model, mode, only=modes the layer is registered for, or none)."""

    def kernelize(model: Any, mode: Any = None, only: Any = "all", repository: Path | None = None) -> Any:
        mode = mode or (kernels.Mode.TRAINING if model.training else kernels.Mode.INFERENCE)
        layer = kernels.LocalLayerRepository(repository or folder, layer_name=LAYER)
        mapping = {} if only is None else {LAYER: {"cpu": layer if only == "all" else {only: layer}}}
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            return kernels.kernelize(model, mode=mode, device="cpu")

    return kernelize


def ran(package: Any) -> int:
    return sum(package.stats()["calls"].values())


@pytest.mark.parametrize("settings", [{}, {"conv_kernel_size": 3, "conv_act": "gelu"}, {"position_buckets": -1}])
@pytest.mark.parametrize("padding", ["none", "right", "holes"])
def test_a_kernelized_model_answers_as_before(
    kernel, kernelize, build, batch, run, in_double, assert_within_budget, padding: str, settings: dict[str, Any]
) -> None:
    model, inputs = build(**settings), batch(padding=padding)
    expected, _ = run(model, inputs, grad=False)
    truth, _ = run(in_double(model), inputs, grad=False)
    found, _ = run(kernelize(model), inputs, grad=False)
    for number, states in enumerate(zip(found, expected, truth, strict=True)):
        assert_within_budget(f"states {number}", *states)
    assert ran(kernel) == 2
    assert kernel.stats()["fallbacks"] == dk.stats()["fallbacks"] == {}
    assert ran(dk) == 0


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_kernelized_model_trains_as_before(
    kernel, kernelize, build, batch, run, in_double, assert_within_budget, checkpoints: bool
) -> None:
    model, inputs = build().train(), batch(padding="right")
    expected, wanted = run(model, inputs)
    _, truth = run(in_double(model), inputs)
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found, gradients = run(kernelize(model), inputs)
    torch.testing.assert_close(found, expected)
    for name, gradient in gradients.items():
        assert_within_budget(name, gradient, wanted[name], truth[name])
    assert ran(kernel) == (4 if checkpoints else 2)


def test_attention_probabilities_and_tuples_are_those_of_transformers(kernel, kernelize, build, batch) -> None:
    model, inputs = build(), batch()
    expected = model(**inputs, output_attentions=True, output_hidden_states=True, return_dict=False)
    found = kernelize(model)(**inputs, output_attentions=True, output_hidden_states=True, return_dict=False)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert ran(kernel) == 0


@pytest.mark.parametrize("how", ["patch", "patch_all"])
@pytest.mark.parametrize("first", ["patch", "kernelize"])
def test_a_patch_takes_over_from_the_layer_and_gives_back(
    kernel, kernelize, build, batch, run, first: str, how: str
) -> None:
    model, inputs = build(), batch(padding="right")
    expected, _ = run(model, inputs, grad=False)

    def patch() -> None:
        if how == "patch":
            report = dk.patch(model, strict=True)
            assert (report.patched, report.encoders, report.left_alone) == (2, 1, {})
        else:
            dk.patch_all(strict=True)

    if first == "patch":
        patch()
        kernelize(model)
    else:
        kernelize(model)
        run(model, inputs, grad=False)
        assert ran(kernel) == 2
        patch()
    kernel.reset_stats()
    found, _ = run(model, inputs, grad=False)
    torch.testing.assert_close(found, expected)
    assert (ran(dk), ran(kernel)) == (2, 0)
    if how == "patch":
        dk.unpatch(model)
    else:
        dk.unpatch_all()
    found, _ = run(model, inputs, grad=False)
    torch.testing.assert_close(found, expected)
    assert (ran(dk), ran(kernel)) == (2, 2)


def test_another_version_of_the_kernel_takes_over(
    kernel, kernelize, build, batch, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hf_kernel.sources()
    monkeypatch.setattr(hf_kernel, "sources", lambda: {**files, "env.py": files["env.py"] + "# another version\n"})
    hf_kernel.write(tmp_path / "other")
    other = kernels.get_local_kernel(tmp_path / "other")
    model, inputs = build(), batch(padding="right")
    expected, _ = run(model, inputs, grad=False)
    run(kernelize(model), inputs, grad=False)
    kernel.reset_stats()
    for used, repository in ((other, tmp_path / "other"), (kernel, None)):
        found, _ = run(kernelize(model, repository=repository), inputs, grad=False)
        torch.testing.assert_close(found, expected)
        assert ran(used) == 2
    assert (ran(other), ran(dk)) == (2, 0)


def test_where_the_layer_is_taken_off_everything_is_as_before(kernel, kernelize, build, batch, run) -> None:
    model, inputs = build(), batch(padding="right")
    expected, _ = run(model, inputs, grad=False)
    only = kernels.Mode.INFERENCE
    run(kernelize(model, only=only), inputs, grad=False)
    assert ran(kernel) == 2
    for mode in (kernels.Mode.TRAINING, kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE):
        found, _ = run(kernelize(model, mode, only=only), inputs, grad=False)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert ran(kernel) == 2


@pytest.mark.parametrize("first", ["patch", "kernelize"])
def test_a_model_without_a_mapping_is_patched_whole_and_unpatched_whole(
    kernelize, build, batch, run, packings, first: str
) -> None:
    model, inputs = build(), batch(8, 64, padding="right")
    expected, _ = run(model, inputs, grad=False)
    if first == "patch":
        dk.patch(model, strict=True)
    kernelize(model, only=None)  # which binds the forwards of the classes to the modules
    if first == "kernelize":
        dk.patch(model, strict=True)
    assert "forward" in vars(model.encoder)
    found, _ = run(model, inputs, grad=False)
    torch.testing.assert_close(found, expected)
    assert ran(dk) == 2
    assert packings[-1] is not None
    dk.unpatch(model)
    found, _ = run(model, inputs, grad=False)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert ran(dk) == 2


def test_copies_stay_kernelized_and_files_do_not_name_the_kernel(kernel, kernelize, build, batch, run) -> None:
    model, inputs = build(), batch(padding="right")
    expected, _ = run(kernelize(model), inputs, grad=False)
    found, _ = run(copy.deepcopy(model), inputs, grad=False)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert ran(kernel) == 4
    file = io.BytesIO()
    torch.save(model, file)
    assert kernel.__name__.encode() not in file.getvalue()
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    found, _ = run(loaded, inputs, grad=False)
    torch.testing.assert_close(found, expected)
    assert ran(kernel) == 4
    assert dk.patch(loaded, strict=True).encoders == 1


def test_an_encoder_of_other_code_keeps_it(kernel, kernelize, build, batch, run) -> None:
    model, inputs = build(), batch()
    original = modeling.DisentangledSelfAttention.disentangled_attention_bias

    def changed(self: Any, *arguments: Any) -> Any:
        return 2 * original(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(modeling.DisentangledSelfAttention, "disentangled_attention_bias", changed)
        expected, _ = run(model, inputs, grad=False)
        found, _ = run(kernelize(model), inputs, grad=False)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert ran(kernel) == 0


def test_the_program_of_the_document_runs(
    kernel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = re.findall(r"python - <<'END'\n(.*?)END\n", (ROOT / "docs" / "hf-kernels.md").read_text(), re.DOTALL)
    settings = geometries.settings("tiny")
    modeling.DebertaV2Model(modeling.DebertaV2Config(**settings)).save_pretrained(tmp_path / "model")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "hf-kernel").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(programs[0].replace("microsoft/deberta-v3-base", "model"), found)
    ids = torch.randint(3, settings["vocab_size"], (2, 9))
    assert ran(kernel) == 0
    found["model"](ids)
    # The same content from another folder is the same code.
    assert ran(sys.modules[kernel.__name__]) == 2


def test_the_switch_of_transformers_puts_the_layer_on(kernel, build, batch, run, folder: Path) -> None:
    from transformers.utils.import_utils import is_kernels_available

    if not is_kernels_available():
        pytest.skip(f"this transformers takes no kernels {kernels.__version__}")
    model, inputs = build(), batch(padding="right")
    expected, _ = run(model, inputs, grad=False)
    repository = kernels.LocalLayerRepository(folder, layer_name=LAYER)
    with kernels.use_kernel_mapping({LAYER: {"cpu": repository}}, inherit_mapping=False):
        model.set_use_kernels(True)
        model.train().eval()  # each of which kernelizes anew
    found, _ = run(model, inputs, grad=False)
    torch.testing.assert_close(found, expected)
    assert ran(kernel) == 2
