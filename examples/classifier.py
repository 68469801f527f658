"""A patched DeBERTa classifier for serve.py and batch_inference.py: found, checked, loaded once, texts to answers."""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["DTYPES", "Answer", "Classifier", "check_model", "cores", "digest", "shared"]

Answer = dict[str, Any]  # "label": str; "score": float; "scores": label -> float; "truncated": bool
DTYPES = ("float32", "bfloat16")
_MODEL_TYPES = ("deberta", "deberta-v2")
_TOKENIZER_FILES = ("tokenizer.json", "spm.model", "vocab.json", "bpe_encoder.bin")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def cores() -> int:
    """Return how many cores this process may use: its affinity, and the limit of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))


def check_model(name: str) -> None:
    """Refuse what cannot be a DeBERTa classifier, by its configuration and the names of its files.

    Raises:
        ValueError: with what is missing, and what to do.
    """
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or not _HUB_ID.fullmatch(name):
            raise ValueError(f"--model must be a directory or a hub id such as owner/name, got {name!r}.")
    elif not (folder / "config.json").is_file():
        raise ValueError(f"--model {name} has no config.json; name a directory that save_pretrained wrote.")
    kind = _model_type(folder)
    if kind not in _MODEL_TYPES:
        raise ValueError(f"--model must hold a DeBERTa (model_type {' or '.join(_MODEL_TYPES)}), got {kind!r}.")
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ValueError(
            f"--model {name} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); "
            "write one there with tokenizer.save_pretrained."
        )


def _model_type(name: Path) -> Any:
    if name.is_dir():
        try:
            return json.loads((name / "config.json").read_text(encoding="utf-8")).get("model_type")
        except ValueError as error:
            raise ValueError(f"--model {name}: config.json cannot be read ({error}).") from error
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(name)).model_type
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"--model {name} is no directory, and the hub gives no configuration: {said}") from error


def digest(name: str) -> dict[str, Any]:
    """Return what tells one state of a model from another: its name, and the sizes and times of its weights."""
    files = sorted(path for path in Path(name).glob("*") if path.suffix in (".safetensors", ".bin"))
    return {"name": name, "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]}


class Classifier:
    """A model and its tokenizer. Load it in the process, and use it in the thread, that computes.

    Args:
        name: directory or hub id of a model with a sequence-classification head.
        threads: of PyTorch, in the thread that makes this object.
        max_length: longest text in tokens; the rest of a longer one is cut off.
        dtype: one of `DTYPES`.
        patch: False computes with Hugging Face's own code.

    Attributes:
        report: what `dk.patch` said, None without it.

    Raises:
        ValueError: the model is no DeBERTa, or its checkpoint has no classification head.
    """

    def __init__(
        self, name: str, threads: int = 1, max_length: int = 512, dtype: str = "float32", patch: bool = True
    ) -> None:
        import torch
        import transformers

        import deberta_kernels as dk

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._torch, self.max_length = torch, max_length
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True
        )
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(
                f"--model {name} has no weights for {', '.join(missing)}: it is no trained classifier. "
                "Fine-tune it first, as examples/sequence_classification.py does."
            )
        self._model = model.eval()
        self.report = dk.patch(self._model) if patch else None

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in the order of the logits."""
        names = self._model.config.id2label
        return [names[number] for number in range(self._model.config.num_labels)]

    def __call__(self, texts: Sequence[str]) -> list[Answer]:
        """Classify texts, of any lengths, in one forward. The padding of the shorter ones costs next to nothing."""
        torch = self._torch
        batch = self._tokenizer(
            list(texts), truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        encodings = getattr(batch, "encodings", None) or [None] * len(texts)
        with torch.inference_mode():
            rows = self._probabilities(self._model(**batch).logits.float()).tolist()
        labels = self.labels
        answers = []
        for row, encoding in zip(rows, encodings):
            best = max(range(len(row)), key=row.__getitem__)
            cut = bool(encoding is not None and encoding.overflowing)
            scores = dict(zip(labels, row))
            answers.append({"label": labels[best], "score": row[best], "scores": scores, "truncated": cut})
        return answers

    def _probabilities(self, logits: Any) -> Any:
        """Return what transformers' text-classification pipeline returns for these logits."""
        problem, count = self._model.config.problem_type, logits.shape[-1]
        if problem == "regression":
            return logits
        if problem == "multi_label_classification" or count == 1:
            return logits.sigmoid()
        return logits.softmax(-1)

    def warm_up(self, batch_size: int) -> None:
        """Run the shapes that come: the library is loaded, threads are started and memory is held afterwards."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a tokenizer about a text that is longer than the model's limit
            self(["word " * self.max_length])
            self(["word"] * batch_size)


@functools.cache
def shared(name: str, threads: int = 1, max_length: int = 512, dtype: str = "float32") -> Classifier:
    """Return this process's one classifier of these options: for engines that send task after task to a process."""
    return Classifier(name, threads, max_length, dtype)
