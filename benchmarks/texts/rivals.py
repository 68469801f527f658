"""The models that read real texts: those of `model/rivals.py`, their int8 forms, and a ModernBERT.

ONNX Runtime and OpenVINO take batches of any size here, since no two batches of real texts have the same one.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.model.batches import Batch
from benchmarks.model.rivals import Call, Models, bert, forward, onnxruntime, openvino, patched
from benchmarks.registry import ModelShape

__all__ = ["INT8", "build"]

# What makes the int8 of each: the settings of the result have it.
INT8 = {
    "onnxruntime-int8": "onnxruntime.quantization.quantize_dynamic, weights QInt8",
    "patched-int8": "torch.ao.quantization.quantize_dynamic, every nn.Linear, then patch",
}
MOST_POSITIONS = 512


def build(name: str, models: Models) -> Call:
    """Return the forward of a candidate: batch -> last hidden state (B, N, C), without gradients."""
    plain = models.plain("float32")
    if name == "onnxruntime":
        return onnxruntime(str(models.exported()))
    if name == "onnxruntime-int8":
        return onnxruntime(str(quantised_file(models.exported())))
    if name == "openvino":
        return openvino(str(models.exported()), None, "float32")
    if name == "patched-int8":
        return forward(patched_int8(plain, models.backend))
    if name == "bert":
        return _other(bert(plain.config, ModelShape(1, MOST_POSITIONS)))
    if name == "modernbert":
        return _other(modernbert())
    if name in ("eager", "sorted"):
        return forward(plain)
    dtype = "bfloat16" if name == "patched-bfloat16" else "float32"
    return forward(patched(models.plain(dtype), models.backend))


def quantised_file(exported: Path) -> Path:
    """Write the exported model with int8 weights, unless it was written before, and return the file."""
    path = exported.with_suffix(".int8.onnx")
    if path.exists():
        return path
    from onnxruntime.quantization import QuantType, quantize_dynamic

    unfinished = path.with_suffix(f".{os.getpid()}")
    logging.disable(logging.WARNING)  # it recommends a step that is for convolutions
    try:
        quantize_dynamic(str(exported), str(unfinished), weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    unfinished.rename(path)
    return path


def patched_int8(plain: Any, backend: str) -> Any:
    """Return a patched copy whose linear layers multiply in int8."""
    from torch.ao.quantization import quantize_dynamic

    import deberta_kernels

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchao will replace it one day
        model = quantize_dynamic(plain, {nn.Linear})
    deberta_kernels.patch(model, backend=backend, strict=True)
    return model


def modernbert() -> Any:
    """Return a ModernBERT-base in its published shape, with random weights and SDPA."""
    import torch
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    return ModernBertModel(ModernBertConfig(attn_implementation="sdpa")).eval()


def _other(model: Any) -> Call:
    """Return the forward of a model that has a vocabulary of its own: the lengths of the texts count, not the words."""
    call, vocabulary = forward(model), model.config.vocab_size

    def read(batch: Batch) -> Tensor:
        return call(Batch(batch.input_ids % vocabulary, batch.attention_mask))

    return read
