"""Everything that is timed: the one place to add something.

A candidate needs a row here and the code that runs it: `core/candidates.py`, `model/rivals.py`, `texts/rivals.py` or
`core/rivals.py`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

__all__ = ["CANDIDATES", "EAGER", "OTHER_MODELS", "OURS", "OURS_LIGHT", "PEERS", "PLAIN", "RUNTIMES", "Candidate"]


@dataclass(frozen=True)
class Candidate:
    """Something that is timed.

    Attributes:
        heading: of its column.
        needs: packages beside torch and transformers, as they are imported.
        dtypes: in which it computes; () for all. Of texts, the one that its answers are exact to.
        ragged: takes part on batches with padding alone.
        colour: in pictures; "" where it is not drawn.
        release: the one whose code was read, where no other may be called.
    """

    heading: str
    needs: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    ragged: bool = False
    colour: str = ""
    release: str = ""

    @property
    def missing(self) -> str:
        """Return which of the packages that it needs are not installed here, "" when all are."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""


# Colours that differ in brightness as well, for whoever does not tell hues apart (after Okabe and Ito): this package,
# its second dtype, eager, what others made.
OURS, OURS_LIGHT, EAGER, PLAIN = "#0f766e", "#7fc8c0", "#d55e00", "#9ca3af"
CANDIDATES: dict[str, dict[str, Candidate]] = {
    "core": {
        "huggingface": Candidate("Hugging Face eager"),
        "eager": Candidate("the budget's eager"),
        "sdpa": Candidate("SDPA without bias"),
        "bare": Candidate("this"),
        "prepared": Candidate("this, prepared tables"),
    },
    "model": {
        "eager": Candidate("eager"),
        "patched": Candidate("patched", colour=OURS),
        "padded": Candidate("unpad=False", ragged=True),
        # Its CPU kernels do not compute in bfloat16.
        "onnxruntime": Candidate("ONNX Runtime", ("onnx", "onnxruntime"), ("float32",), colour="#56b4e9"),
        "openvino": Candidate("OpenVINO", ("onnx", "openvino"), colour="#cc79a7"),
        "bert": Candidate("BERT, SDPA", colour=PLAIN),
    },
    "texts": {
        "eager": Candidate("Hugging Face eager", dtypes=("float32",), colour=EAGER),
        "sorted": Candidate("eager, texts sorted by length", dtypes=("float32",), colour=EAGER),
        "onnxruntime": Candidate("ONNX Runtime", ("onnx", "onnxruntime"), ("float32",), colour=PLAIN),
        "onnxruntime-int8": Candidate("ONNX Runtime, int8", ("onnx", "onnxruntime"), ("int8",), colour=PLAIN),
        "openvino": Candidate("OpenVINO", ("onnx", "openvino"), ("float32",), colour=PLAIN),
        "patched": Candidate("patched, float32", dtypes=("float32",), colour=OURS),
        "patched-bfloat16": Candidate("patched, bfloat16", dtypes=("bfloat16",), colour=OURS),
        "patched-int8": Candidate("patched, int8", dtypes=("int8",), colour=OURS),
        # Other models, which give other answers.
        "bert": Candidate("BERT-base"),
        "modernbert": Candidate("ModernBERT-base"),
    },
    "train": {
        "eager": Candidate("eager"),
        "patched": Candidate("patched"),
        "native": Candidate("native linears", dtypes=("float32",)),
    },
    "linear": {"pytorch": Candidate("pytorch"), "onednn": Candidate("onednn"), "native": Candidate("native")},
    "adapters": {"eager": Candidate("eager"), "patched": Candidate("patched")},
    "tensorflow": {
        "graph": Candidate("TensorFlow", ("tensorflow", "tf_keras")),
        "xla": Candidate("TensorFlow, XLA", ("tensorflow", "tf_keras")),
        "eager": Candidate("PyTorch eager"),
        "patched": Candidate("patched"),
    },
    "gpu": {
        "bare": Candidate("ours"),
        "triton": Candidate("triton"),
        "cuda": Candidate("cuda"),
        "sdpa": Candidate("SDPA flash"),
        "huggingface": Candidate("HF eager"),
        "compiled": Candidate("HF compiled"),
        "flashdeberta": Candidate("flashdeberta", ("flashdeberta",), release="0.0.8"),
        "disentangled-flash": Candidate("disent.-flash", ("disentangled_flash",), release="1.1.1"),
    },
}
# The better one of a shape is compared with, medians and minima chosen apart.
RUNTIMES = ("onnxruntime", "openvino")
# Of texts: other models, which are not drawn.
OTHER_MODELS = ("bert", "modernbert")
PEERS = tuple(name for name, candidate in CANDIDATES["gpu"].items() if candidate.release)
