"""Checkpoints written by TensorFlow: moved over as docs/tensorflow.md says, patched, held to TensorFlow's answers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import needs

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = needs.package("tensorflow")
import transformers
from transformers.modeling_tf_pytorch_utils import load_tf2_checkpoint_in_pytorch_model

import deberta_kernels as dk
from benchmarks.model.tensorflow import moved, weights
from deberta_kernels.testing import geometries

CLASS = "DebertaV2ForSequenceClassification"
DOCUMENT = Path(__file__).parents[2] / "docs" / "tensorflow.md"
MOST = 1e-4
VARIANTS = {
    "v3": {},
    "v2 with convolution": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "linear positions": {"position_buckets": -1, "norm_rel_ebd": "none"},
    "shorter linear positions": {"position_buckets": -1, "max_relative_positions": 12},
    "c2p alone": {"pos_att_type": ["c2p"]},
    "p2c alone": {"pos_att_type": ["p2c"]},
    "absolute positions and segments": {"position_biased_input": True, "type_vocab_size": 2},
    "narrow embeddings": {"embedding_size": 16},
}


@pytest.fixture
def build() -> Callable[..., Any]:
    """Build a small random TensorFlow model whose biases and norms are random too."""

    def build(**settings: Any) -> Any:
        tf.keras.utils.set_random_seed(0)
        chosen = geometries.settings("tiny", initializer_range=0.2, num_labels=3, **settings)
        model = getattr(transformers, f"TF{CLASS}")(transformers.DebertaV2Config(**chosen))
        model(**model.dummy_inputs)
        for weight in model.weights:
            if len(weight.shape) == 1:
                weight.assign_add(0.2 * tf.random.normal(weight.shape))
        return model

    return build


def ragged(lengths: tuple[int, ...], vocabulary: int) -> dict[str, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, vocabulary, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids * mask, "attention_mask": mask}


def answers(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    if isinstance(model, torch.nn.Module):
        with torch.inference_mode():
            return model(**inputs).logits.clone()
    return torch.from_numpy(model({name: x.numpy() for name, x in inputs.items()}).logits.numpy())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_patched_model_gives_the_answers_of_tensorflow(build, tmp_path: Path, name: str) -> None:
    source = build(**VARIANTS[name])
    model = moved(getattr(transformers, CLASS), source.config, weights(source, str(tmp_path)))
    report = dk.patch(model, strict=True)
    assert (report.patched, report.encoders, report.left_alone) == (2, 1, {})
    for lengths in ((40, 23, 7), (48,), (64, 1, 1, 2, 9, 3, 4, 17)):
        inputs, count = ragged(lengths, source.config.vocab_size), dk.stats()["calls"]
        expected, found = answers(source, inputs), answers(model, inputs)
        assert expected.std() > 100 * MOST
        torch.testing.assert_close(found, expected, atol=MOST, rtol=0)
        assert sum(dk.stats()["calls"].values()) == sum(count.values()) + 2
    dk.unpatch(model)
    torch.testing.assert_close(answers(model, inputs), expected, atol=MOST, rtol=0)


def test_the_programs_of_the_document_move_a_checkpoint_and_patch_it(build, tmp_path: Path) -> None:
    source = build()
    source.save_pretrained(tmp_path / "source")
    target = tmp_path / "target"
    programs = re.findall(r"python - <<'END'\n(.*?)END\n", DOCUMENT.read_text(), re.DOTALL)
    assert len(programs) == 2
    environment = {**os.environ, "SOURCE": str(tmp_path / "source"), "TARGET": str(target)}
    for number, program in enumerate(programs):
        # The second one needs no TensorFlow, nor the old checkpoint.
        text = program if number == 0 else f"import sys; sys.modules['tensorflow'] = None\n{program}"
        done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if number == 0:
            shutil.rmtree(tmp_path / "source")
    assert "patched 2 attention modules and 1 encoder" in done.stdout
    assert (target / "model.safetensors").is_file()
    model = getattr(transformers, CLASS).from_pretrained(target).eval()
    dk.patch(model, strict=True)
    inputs = ragged((40, 23, 7), source.config.vocab_size)
    torch.testing.assert_close(answers(model, inputs), answers(source, inputs), atol=MOST, rtol=0)


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_what_the_document_says_does_not_work_does_not(build, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "shared")
    model = getattr(transformers, CLASS).from_pretrained(tmp_path / "shared", from_tf=True)
    assert {x.device.type for x in model.parameters()} == {"meta"}
    source = build(share_att_key=False)
    path = weights(source, str(tmp_path / "own"))
    with pytest.raises(AttributeError, match=r"pos_key_proj.weight not found in TF 2.0 model"):
        load_tf2_checkpoint_in_pytorch_model(getattr(transformers, CLASS)(source.config), str(path))
