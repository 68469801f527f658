"""The whole models that are timed: eager, patched, ONNX Runtime, OpenVINO and a BERT of the same size.

All but BERT hold the same weights. ONNX Runtime and OpenVINO get the eager model, exported with dynamic batch and
length; the exported file is kept under build/.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.process import ROOT
from benchmarks.model.batches import Batch
from benchmarks.registry import CANDIDATES, RUNTIMES, ModelShape
from deberta_kernels.testing.geometries import settings

__all__ = [
    "Call",
    "Models",
    "build",
    "candidate_names",
    "export",
    "forward",
    "load_plain",
    "onnxruntime",
    "openvino",
    "patched",
]

EXPORTS = ROOT / "build" / "benchmarks"
INPUTS = ("input_ids", "attention_mask")
# The last one that all supported versions of torch write without converting.
OPSET = 17
Call = Callable[[Batch], Tensor]


def candidate_names(shape: ModelShape) -> list[str]:
    """Return the candidates of a shape, installed or not."""
    return [
        name
        for name, candidate in CANDIDATES["model"].items()
        if (not candidate.dtypes or shape.dtype in candidate.dtypes) and (shape.fill < 1.0 or not candidate.ragged)
    ]


def load_plain(source: str) -> Any:
    """Return the model as transformers makes it, float32, eval.

    Args:
        source: directory of a checkpoint; "" for random weights in v3-base geometry.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    if source:
        return transformers.AutoModel.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
    torch.manual_seed(0)
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**settings("v3-base", vocab_size=1024))).eval()


class _HiddenStates(nn.Module):
    """A model that returns the last hidden state alone, so that the exported graph has one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return hidden


def export(plain: Any, source: str) -> Path:
    """Write the model as ONNX, unless the same one was written before, and return the file.

    The exporter that traces is used: its graph is as exact as that of the one built on torch.export, a few per cent
    faster in ONNX Runtime, and it needs no package but onnx.
    """
    import transformers

    state = [torch.__version__, transformers.__version__, OPSET, plain.config.to_dict(), str(Path(source).resolve())]
    checksums = [float(x.detach().double().sum()) for x in plain.parameters()]
    key = hashlib.sha256(json.dumps([state, checksums], default=str).encode()).hexdigest()[:16]
    path = EXPORTS / f"model-{key}.onnx"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = torch.randint(1, plain.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 16:] = 0
    unfinished = path.with_suffix(f".{os.getpid()}")
    axes = {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tracing makes constant does not depend on the sizes; the check tells
        torch.onnx.export(
            _HiddenStates(plain).eval(),
            (ids, mask),
            str(unfinished),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=["last_hidden_state"],
            dynamic_axes=dict.fromkeys((*INPUTS, "last_hidden_state"), axes),
        )
    unfinished.rename(path)
    return path


def build(name: str, shape: ModelShape, plain: Any, exported: Path | None, backend: str) -> Call:
    """Return the forward of a candidate: batch -> last hidden state (B, N, C), without gradients.

    Args:
        name: one of `candidate_names(shape)`.
        shape: what it will run on.
        plain: the model in the dtype of the shape; ONNX Runtime and OpenVINO need None.
        exported: the exported file; the others need None.
        backend: backend of the patched models.
    """
    if name == "onnxruntime":
        return onnxruntime(str(exported))
    if name == "openvino":
        return openvino(str(exported), shape, shape.dtype)
    if name == "bert":
        return forward(bert(plain.config, shape))
    return forward(plain if name == "eager" else patched(plain, backend, unpad="auto" if name == "patched" else False))


def patched(plain: Any, backend: str, **settings: Any) -> Any:
    """Return a patched copy that shares the weights; `settings` are those of `deberta_kernels.patch`."""
    import deberta_kernels

    shared: dict[int, Any] = {id(x): x for x in (*plain.parameters(), *plain.buffers())}
    model = copy.deepcopy(plain, shared)
    deberta_kernels.patch(model, backend=backend, strict=True, **settings)
    return model


def bert(config: Any, shape: ModelShape) -> Any:
    """Return a BERT with the sizes of a DeBERTa and random weights, its attention computed by SDPA."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    chosen = {name: getattr(config, name) for name in sizes}
    chosen["max_position_embeddings"] = max(512, shape.length)
    chosen["attn_implementation"] = "sdpa"
    model = BertModel(BertConfig(**chosen), add_pooling_layer=False)
    return model.to(getattr(torch, shape.dtype)).eval()


def forward(model: Any) -> Call:
    """Return the last hidden state of a model as a function of a batch, without gradients."""

    def call(batch: Batch) -> Tensor:
        with torch.no_grad():
            hidden: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        return hidden

    return call


def _arrays(batch: Batch) -> dict[str, Any]:
    return {name: getattr(batch, name).numpy() for name in INPUTS}


def onnxruntime(path: str) -> Call:
    """Return the forward of an exported file in ONNX Runtime."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, _arrays(batch))[0])


def openvino(path: str, shape: ModelShape | None, dtype: str) -> Call:
    """Return the forward of an exported file in OpenVINO, compiled for one size; None: for any size."""
    import openvino as runtime

    core = runtime.Core()
    model = core.read_model(path)
    # Compiled for the one size: up to a tenth faster than with dynamic sizes.
    if shape is not None:
        model.reshape({name: [shape.batch, shape.length] for name in INPUTS})
    # Left alone, it would choose bfloat16 by itself where the processor has it.
    precision = "f32" if dtype == "float32" else "bf16"
    asked = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    request = core.compile_model(model, "CPU", asked).create_infer_request()
    return lambda batch: torch.from_numpy(request.infer(_arrays(batch))[0])


@dataclass
class Models:
    """The models that the shapes of one run share.

    Attributes:
        source: directory of a checkpoint, or "" for random weights.
        backend: of the patched ones.
    """

    source: str
    backend: str
    _models: dict[str, Any] = field(default_factory=dict)
    _exported: Path | None = None

    def plain(self, dtype: str) -> Any:
        """Return the eager model in a dtype; that in float32 is the one the others are made from."""
        if dtype not in self._models:
            first = self._models.setdefault("float32", self._models.get("float32") or load_plain(self.source))
            if dtype != "float32":
                self._models[dtype] = copy.deepcopy(first).to(getattr(torch, dtype))
        return self._models[dtype]

    def exported(self) -> Path:
        """Return the exported file, written when first needed."""
        if self._exported is None:
            self._exported = export(self.plain("float32"), self.source)
        return self._exported

    def call(self, name: str, shape: ModelShape) -> Call:
        """Return the forward of a candidate."""
        if name in RUNTIMES:
            return build(name, shape, None, self.exported(), self.backend)
        return build(name, shape, self.plain(shape.dtype), None, self.backend)
