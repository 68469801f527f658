"""Every shape and figure of the measurements: the one place to add one. The candidates are in `candidates.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.candidates import CANDIDATES, PEERS, RUNTIMES, Candidate
from benchmarks.harness.figures import Figure

__all__ = [
    "ADAPTERS", "CANDIDATES", "CORE_FIGURES", "CORE_GROUPS", "CORE_MODEL_FIGURES", "DTYPES", "GPU_FIGURES",
    "GPU_LENGTHS", "GROUPS", "LARGE", "LINEAR_FIGURES", "LINEAR_TOKENS", "MODEL_FIGURES", "MODEL_SHAPES", "PEERS",
    "ROUGH", "RUNTIMES", "TENSORFLOW_FIGURES", "TENSORFLOW_SHAPES", "TEXTS", "TRAIN_FIGURES", "TRAIN_SHAPES",
    "Candidate", "Large", "ModelShape", "Shape", "Texts", "Workload",
]  # fmt: skip

# Of whole models and training steps.
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Shape:
    """One timed problem; heads and head size are those of v3-base.

    Attributes:
        batch: sequences.
        length: tokens of each sequence, queries and keys alike.
        dtype: "float32" or "bfloat16".
        backward: time forward and backward with all five gradients instead of the forward alone.
    """

    batch: int
    length: int
    dtype: str = "float32"
    backward: bool = False

    @property
    def label(self) -> str:
        """Return batch x length, as every table prints it."""
        return f"{self.batch}x{self.length}"


@dataclass(frozen=True)
class ModelShape(Shape):
    """One timed batch of a whole model.

    Attributes:
        fill: real tokens over batch * length; the rest is padding on the right.
    """

    fill: float = 1.0

    @property
    def label(self) -> str:
        """Return batch x length, and the fill where there is padding."""
        full = f"{self.batch}x{self.length}"
        return full if self.fill == 1.0 else f"{full} {self.fill:.0%} full"


NO_BOUND = (None, None)

# The attention core. Bars are (must, aim). A ratio to code of others has one only where every processor measured so far
# could reach it at its own peak; elsewhere the share of that peak is held to a bar in its place.
CORE_SIZES = ((1, 128), (8, 128), (1, 512), (8, 512), (1, 2048))
CORE_BACKWARD_SIZES = {(1, 512): (3.0, 5.0), (8, 128): (4.0, 6.0), (4, 512): (6.0, 8.0)}
CORE_EAGER = {(1, 128): NO_BOUND, (8, 128): (6.0, 10.0), (1, 512): NO_BOUND, (1, 2048): NO_BOUND}
CORE_SHARE = {"float32": (60.0, 75.0), "bfloat16": (50.0, 75.0)}
CORE_SDPA: dict[tuple[str, str], dict[tuple[int, int], tuple[float | None, float | None]]] = {
    ("float32", "prepared"): {},
    ("float32", "bare"): {(1, 128): (1.3, None), (8, 128): (1.3, None)},
    ("bfloat16", "prepared"): {(1, 128): (0.5, 0.37), (8, 128): (0.5, 0.37), (1, 2048): (0.5, 0.37)},
    ("bfloat16", "bare"): {(1, 128): (0.65, 0.37), (8, 128): (0.65, 0.37), (1, 2048): (0.5, 0.37)},
}
CORE_GROUPS = ("sdpa32", "sdpa16", "eager", "backward", "peak")
GROUPS = (*CORE_GROUPS, "model", "memory")


def _core() -> tuple[Figure, ...]:
    found = []
    for (dtype, ours), bars in CORE_SDPA.items():
        short = dtype == "float32"
        title = f"core forward {dtype} / SDPA {'' if short else 'bfloat16 '}without bias"
        for size in CORE_SIZES:
            shape, bar = Shape(*size, dtype), bars.get(size, NO_BOUND)
            case = f"{shape.label}, {ours}"
            found.append(Figure("sdpa32" if short else "sdpa16", title, shape, ours, ("sdpa",), *bar, "time", case))
    for size, bar in CORE_EAGER.items():
        for ours in ("prepared", "bare"):
            title, shape = "core forward float32, times faster than eager", Shape(*size)
            case = f"{shape.label}, {ours}"
            found.append(Figure("eager", title, shape, ours, ("huggingface",), *bar, "speed", case))
    for dtype, suffix in (("float32", ""), ("bfloat16", " bfloat16")):
        title = f"core forward + backward {dtype}, times faster than eager{suffix}"
        for size, bar in CORE_BACKWARD_SIZES.items():
            shape, bar = Shape(*size, dtype, backward=True), bar if dtype == "float32" else NO_BOUND
            found.append(Figure("backward", title, shape, "bare", ("huggingface",), *bar, "speed"))
    for dtype, bar in CORE_SHARE.items():
        title = f"needed FLOPs / own GEMM peak, {dtype}"
        for size in CORE_SIZES:
            shape = Shape(*size, dtype)
            found.append(Figure("peak", title, shape, "prepared", (), *bar, "share", f"{shape.label}, prepared"))
    for dtype in CORE_SHARE:
        title = f"needed FLOPs / own GEMM peak, forward + backward, {dtype}"
        for size in CORE_BACKWARD_SIZES:
            found.append(Figure("peak", title, Shape(*size, dtype, True), "bare", (), *NO_BOUND, "share"))
    return tuple(found)


CORE_FIGURES = _core()

# Whole models. A size without an entry is measured all the same and has no bound.
MODEL_SIZES = ((1, 8), (1, 16), (1, 32), (1, 64), (1, 128), (1, 512), (1, 2048), (8, 128), (8, 512))
RAGGED, RAGGED_FILL = (8, 128), 0.6
MODEL_EAGER: dict[str, dict[tuple[int, int], tuple[float | None, float | None]]] = {
    "float32": {(1, 128): (1.9, None), (1, 512): (1.6, None), (1, 2048): (4.5, None)},
    "bfloat16": {(1, 128): (2.0, 3.0)},
}
MODEL_RUNTIME, MODEL_RUNTIME_RAGGED, MODEL_BERT = (1.0, 1.3), (1.5, 2.0), (1.0, 0.7)
MODEL_SHARE = {"float32": (75.0, 90.0), "bfloat16": (65.0, 85.0)}
# The core's short look at whole models, against the same bars.
MODEL_LENGTHS = (128, 512, 2048)


def _model_shapes() -> tuple[ModelShape, ...]:
    found = []
    for dtype in MODEL_EAGER:
        found += [ModelShape(*size, dtype) for size in MODEL_SIZES]
        found.append(ModelShape(*RAGGED, dtype, fill=RAGGED_FILL))
    return tuple(found)


MODEL_SHAPES = _model_shapes()


def _model() -> tuple[Figure, ...]:
    found = []
    for shape in MODEL_SHAPES:
        ragged, size, dtype = shape.fill < 1.0, (shape.batch, shape.length), shape.dtype
        eager = NO_BOUND if ragged else MODEL_EAGER[dtype].get(size, NO_BOUND)
        # The bounds against the runtimes are for float32; only one of them computes in bfloat16.
        runtime = (MODEL_RUNTIME_RAGGED if ragged else MODEL_RUNTIME) if dtype == "float32" else NO_BOUND
        # A text of 32 tokens is mostly the model's other layers.
        share = NO_BOUND if shape.length < 128 else MODEL_SHARE[dtype]
        better = "times faster than the better of ONNX Runtime and OpenVINO"
        rows: list[tuple[str, tuple[str, ...], tuple[float | None, float | None], str]] = [
            ("times faster than eager", ("eager",), eager, "speed"),
            (better, RUNTIMES, runtime, "speed"),
            ("time / time of BERT with SDPA", ("bert",), MODEL_BERT, "time"),
            ("needed FLOPs / highest rate of a product", (), share, "share"),
        ]
        if ragged:
            rows.append(("times faster than with unpad=False", ("padded",), NO_BOUND, "speed"))
        for title, others, bar, sense in rows:
            foreign = others == RUNTIMES
            found.append(Figure(dtype, f"{title}, {dtype}", shape, "patched", others, *bar, sense, foreign=foreign))
    titles = list(dict.fromkeys(figure.title for figure in found))
    return tuple(sorted(found, key=lambda figure: titles.index(figure.title)))


MODEL_FIGURES = _model()

CORE_MODEL_FIGURES = tuple(
    Figure("model", "whole v3-base, eval, float32, times faster than unpatched", ModelShape(1, length), "patched",
           ("unpatched",), *MODEL_EAGER["float32"][1, length], "speed")
    for length in MODEL_LENGTHS
)  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Real texts as they come, in batches of eight.

    Attributes:
        name: in files.
        title: what tables and pictures say.
        batches: of the collection, which is sorted as a whole.
        long: texts of each batch that are passages; the others are sentences.
        timed: batches, from the first on, that are timed as they come; all are alike.
        batch: texts of a batch.
        longest: tokens at which a passage ends, after its last whole sentence; 384 is usual in question answering.
        sentence: tokens that a sentence has at most.
    """

    name: str
    title: str
    batches: int
    long: int
    timed: int
    batch: int = 8
    longest: int = 384
    sentence: int = 64

    @property
    def label(self) -> str:
        """Return the title, and how many texts there are."""
        return f"{self.title}, {self.batches * self.batch} texts"


TEXTS = (
    Texts("mixed", "one long text and seven sentences in each batch", 8, 1, 1),
    Texts("sentences", "eight sentences in each batch", 8, 0, 2),
)
# Root mean square of the error over that of the answers, above which a less exact dtype is wrong. Answers that have
# nothing to do with the right ones are at 1.4, the square root of 2.
ROUGH = {"bfloat16": 0.05, "int8": 0.3}

# A model of TensorFlow and the same moved over, float32.
TENSORFLOW_SHAPES = (ModelShape(1, 128), ModelShape(1, 512), ModelShape(8, 128), ModelShape(*RAGGED, fill=RAGGED_FILL))
TENSORFLOW_FIGURES = tuple(
    Figure("tensorflow", title, shape, "patched", others, *NO_BOUND, "speed", foreign=True)
    for title, others in (
        ("times faster than TensorFlow, with or without XLA", ("graph", "xla")),
        ("times faster than PyTorch eager", ("eager",)),
    )
    for shape in TENSORFLOW_SHAPES
)

# Training steps: (must, aim) against eager.
TRAIN_EAGER = {
    "float32": {(8, 128): (1.25, 2.2), (4, 512): (1.6, 2.8)},
    "bfloat16": {(8, 128): (1.3, 2.0), (4, 512): (1.6, 2.5)},
}
TRAIN_SHARE = {"float32": (75.0, 90.0), "bfloat16": (70.0, 85.0)}
TRAIN_SHAPES = tuple(ModelShape(*size, dtype) for dtype, sizes in TRAIN_EAGER.items() for size in sizes)


def _train() -> tuple[Figure, ...]:
    found = []
    for name, title in (("patched", "PyTorch's linears"), ("native", "native linears")):
        for shape in TRAIN_SHAPES:
            dtype = shape.dtype
            if (dtypes := CANDIDATES["train"][name].dtypes) and dtype not in dtypes:
                continue
            must, aim = TRAIN_EAGER[dtype][shape.batch, shape.length]
            # In float32 the aims are for native ones.
            aims = name == "native" or dtype == "bfloat16"
            speed = f"training step, times faster than eager, {dtype}, {title}"
            found.append(Figure(dtype, speed, shape, name, ("eager",), must, aim if aims else None, "speed"))
            share = f"training step, needed FLOPs / highest rate of a product, {dtype}, {title}"
            found.append(Figure(dtype, share, shape, name, (), *(TRAIN_SHARE[dtype] if aims else NO_BOUND), "share"))
    return tuple(sorted(found, key=lambda figure: (figure.sense != "speed", figure.ours == "native")))


TRAIN_FIGURES = _train()

# Linear layers: the tokens at which those of one encoder layer are timed.
LINEAR_TOKENS = (1, 4, 8, 16, 32, 64, 128, 192, 256, 512, 1024, 2048)
LINEAR_SHARE = {"float32": (75.0, 90.0), "bfloat16": (70.0, 85.0)}


def _linear() -> tuple[Figure, ...]:
    found = []
    for dtype, share in LINEAR_SHARE.items():
        for title, others, bar, sense in (
            (f"linear layers, times faster than PyTorch, {dtype}", ("pytorch",), NO_BOUND, "speed"),
            (f"linear layers, needed FLOPs / highest rate of a product, {dtype}", (), share, "share"),
        ):
            for tokens in LINEAR_TOKENS:
                # Of a few tokens, the time is that of reading the weights.
                bars = bar if tokens >= 128 else NO_BOUND
                shape, case = Shape(1, tokens, dtype), f"{tokens} tokens"
                found.append(Figure(dtype, title, shape, "native", others, *bars, sense, case))
    return tuple(found)


LINEAR_FIGURES = _linear()


@dataclass(frozen=True)
class Workload:
    """What is timed of an adapter.

    Attributes:
        method: name of an adapter of the model.
        title: what the table says of it.
        batch: samples.
        length: tokens of each, all of them real.
        train: forward, backward and an optimizer's step of the adapter; False: a forward under inference_mode.
        must: speed-up that has to be reached, or None.
    """

    method: str
    title: str
    batch: int
    length: int
    train: bool
    must: float | None = None

    @property
    def label(self) -> str:
        """Return the shape and what is done."""
        return f"{self.batch}x{self.length} float32, {'training step' if self.train else 'eval'}"

    @property
    def figure(self) -> Figure:
        """Return how the patched model stands against eager."""
        return Figure("adapters", self.title, self, "patched", ("eager",), self.must, None, "speed")


LORA, PREFIX = "LoRA on q, k, v, rank 8", "prefix tuning, 30 tokens"
ADAPTERS = {
    "adapters": (
        Workload("prefix", PREFIX, 1, 512, False, 1.5),
        Workload("lora", LORA, 4, 512, True, 1.5),
        Workload("lora", LORA, 1, 512, False),
        Workload("prompt", "prompt tuning, 30 tokens", 1, 512, False),
        Workload("bottleneck", "seq_bn", 1, 128, False),
    ),
    "peft": (Workload("lora", LORA, 4, 512, True, 1.5), Workload("lora", LORA, 1, 512, False)),
}


@dataclass(frozen=True)
class Large:
    """A model and a batch whose memory alone matters.

    Attributes:
        title: what is measured.
        batch: sequences.
        length: tokens of each.
        dtype: of the weights.
        must: bound for the peak above the weights, in bytes, or None.
        needs: free memory, in bytes, below which it is not tried.
        model: its sizes, a name of `deberta_kernels.testing.geometries`.
        settings: what differs from them.
        eager: also run the unpatched model, and compare.
    """

    title: str
    batch: int
    length: int
    dtype: str
    must: float | None
    needs: float
    model: str = "v3-base"
    settings: dict[str, Any] = field(default_factory=dict)
    eager: bool = False


ONE_LAYER, SMALL_VOCABULARY = {"num_hidden_layers": 1, "vocab_size": 1024}, {"vocab_size": 1024}
LARGE = {
    "document": Large("v3-base, one document", 1, 16384, "float32", 3e9, 6e9, settings=SMALL_VOCABULARY),
    "layer-16384": Large("one layer of v3-base", 1, 16384, "float32", None, 3e9, settings=ONE_LAYER),
    "layer-32768": Large("one layer of v3-base", 1, 32768, "float32", None, 4e9, settings=ONE_LAYER),
    "v2-xxlarge": Large("v2-xxlarge, weights included", 4, 128, "bfloat16", 24e9, 12e9, "v2-xxlarge", eager=True),
}

# GPU: every length with 16,384 tokens. (must, aim) by length.
GPU_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
_FLASH = {512: (0.30, 0.45), 2048: (0.50, 0.65), 8192: (0.75, 0.90)}
_EAGER = {512: (4.0, 8.0), 2048: (10.0, 20.0)}


def _gpu() -> tuple[Figure, ...]:
    rows: list[tuple[str, bool, tuple[str, ...], dict[int, tuple[float, float]], str]] = [
        ("forward, of SDPA flash's speed", False, ("sdpa",), _FLASH, "fraction"),
        ("forward, times the best peer", False, PEERS, dict.fromkeys(_FLASH, (3, 5)), "speed"),
        ("forward + backward, times the best peer", True, PEERS, dict.fromkeys(_FLASH, (2.5, 4)), "speed"),
        ("forward + backward, times Hugging Face eager", True, ("huggingface",), _EAGER, "speed"),
        ("extra memory, forward", False, (), {8192: (20.0, 12.0)}, "memory"),
        ("extra memory, forward + backward", True, (), {8192: (60.0, 30.0)}, "memory"),
    ]
    return tuple(
        Figure("gpu", title, Shape(16384 // n, n, "bfloat16", backward), "bare", others, *bar, sense, f"N {n}")
        for title, backward, others, bars, sense in rows
        for n, bar in bars.items()
    )


GPU_FIGURES = _gpu()
