"""Time a model of TensorFlow beside the same weights in PyTorch, as transformers makes it and patched.

python -m benchmarks tensorflow --threads 1    v3-base with random weights, five minutes; make bench-tensorflow
python -m benchmarks tensorflow --quick        batches of up to 512 tokens

Before a shape is timed, TensorFlow and the patched model are held to what eager's own error against float64 allows.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import record, tables
from benchmarks.harness.clock import interleave, rotating
from benchmarks.harness.machine import package_versions
from benchmarks.harness.process import note
from benchmarks.harness.record import Progress, Run
from benchmarks.model.batches import Batch, draw_batches
from benchmarks.model.checking import Tolerance, check_call, tolerance, truths
from benchmarks.model.rivals import Call, forward, patched
from benchmarks.model.run import PACE, QUICK_PACE, QUICK_TOKENS
from benchmarks.registry import CANDIDATES, TENSORFLOW_FIGURES, TENSORFLOW_SHAPES, ModelShape
from deberta_kernels.testing.geometries import settings

__all__ = ["main", "moved", "weights"]

WEIGHTS = "tf_model.h5"


def weights(model: Any, folder: str) -> Path:
    """Write a TensorFlow model as `save_pretrained` does; return the file of its weights."""
    model.save_pretrained(folder)
    return Path(folder) / WEIGHTS


def moved(cls: Any, config: Any, path: Path) -> Any:
    """Return a PyTorch model, eval, with the weights of a TensorFlow checkpoint.

    Raises:
        ValueError: a weight of one of them has no match in the other.
    """
    from transformers.modeling_tf_pytorch_utils import load_tf2_checkpoint_in_pytorch_model

    model, found = load_tf2_checkpoint_in_pytorch_model(cls(config), str(path), output_loading_info=True)
    if any(found.values()):
        raise ValueError(f"the weights of {path} must be those of {cls.__name__}, but they differ: {found}")
    return model.eval()


def _calls(given: argparse.Namespace) -> tuple[Any, dict[str, Call]]:
    """Return the eager model and the forwards of all candidates: batch -> last hidden state."""
    # transformers' classes are those of Keras 2; and what TensorFlow says at its start is not for the reader.
    os.environ.update(TF_USE_LEGACY_KERAS="1", TF_CPP_MIN_LOG_LEVEL="3")
    import tensorflow as tf
    import transformers

    tf.config.threading.set_intra_op_parallelism_threads(given.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    transformers.logging.set_verbosity_error()
    tf.keras.utils.set_random_seed(0)
    config = transformers.DebertaV2Config(**settings("v3-base", vocab_size=1024))
    source = transformers.TFDebertaV2Model(config)
    source(**source.dummy_inputs)
    with tempfile.TemporaryDirectory() as folder:
        plain = moved(transformers.DebertaV2Model, config, weights(source, folder))

    def compiled(**options: Any) -> Call:
        function = tf.function(lambda ids, mask: source(input_ids=ids, attention_mask=mask)[0], **options)
        return lambda batch: torch.from_numpy(function(batch.input_ids.numpy(), batch.attention_mask.numpy()).numpy())

    calls = {"graph": compiled(), "xla": compiled(jit_compile=True), "eager": forward(plain)}
    return plain, {**calls, "patched": forward(patched(plain, given.backend))}


def _measure(
    run: Run, shape: ModelShape, batches: list[Batch], calls: dict[str, Call], truth: Any, shorter: list[Tolerance]
) -> dict[str, Any]:
    found: dict[str, Any] = {**shape.__dict__, "label": shape.label, "checks": {}, "missing": {}}
    eager = calls["eager"](batches[0])
    limits = tolerance(shape, batches[0], eager, truth, shorter)
    shorter.append(limits)
    right = {"eager": calls["eager"]}
    for name in ("graph", "xla", "patched"):
        outcome = check_call(calls[name], eager, batches[0], truth, limits)
        found["checks"][name] = {**outcome.as_json(), "text": outcome.text}
        if outcome.ok:
            right[name] = calls[name]
        else:
            note(f"{shape.label}: {name} is RED, not timed: {outcome.text}")
    turning = {name: rotating(call, batches) for name, call in right.items()}
    samples = interleave(turning, QUICK_PACE if run.quick else PACE)
    return {**found, "tolerance": limits.as_json(), "samples": {name: x.as_json() for name, x in samples.items()}}


def main(arguments: list[str] | None = None) -> int:
    """Run; return the exit status: 1 for a wrong answer of ours."""
    given = record.options("tensorflow", __doc__).parse_args(arguments)
    if absent := CANDIDATES["tensorflow"]["graph"].missing:
        raise SystemExit(f"{absent}; `make bench-tensorflow` makes an environment with them")
    run = Run("tensorflow", given, model="v3-base, random weights")
    run.result["versions"] |= package_versions(("tensorflow", "tf-keras"))
    shapes = [shape for shape in TENSORFLOW_SHAPES if not run.quick or shape.batch * shape.length <= QUICK_TOKENS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, calls = _calls(given)
        batches = {shape: draw_batches(shape, plain.config.vocab_size) for shape in shapes}
        known = truths(plain, {shape: found[0] for shape, found in batches.items()})
        records: list[dict[str, Any]] = []
        allowed: list[Tolerance] = []
        progress = Progress(10 + shape.batch * shape.length / 100 for shape in shapes)
        for shape, found in batches.items():
            records.append(_measure(run, shape, found, calls, known.get(shape), allowed))
            by_label = {x["label"]: x for x in records}
            lines = [run.judge(figure, by_label.get(figure.shape.label), None) for figure in TENSORFLOW_FIGURES]
            run.keep(lines, moved=records, complete=len(records) == len(shapes))
            progress.step(f"{shape.label}: {run.times(records[-1]['samples'])}")
    print(tables.text(run.result))
    return run.status
