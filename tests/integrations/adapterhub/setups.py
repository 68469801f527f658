"""What the tests of AdapterHub choose from: adapter methods, kinds of models, and ways to compose two adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adapters
from adapters import composition as ac

PACKAGES = ("adapters", "transformers", "torch")
METHODS: dict[str, Any] = {
    "seq_bn": "seq_bn",
    "double_seq_bn": "double_seq_bn",
    "par_bn": "par_bn",
    "scaled_par_bn": "scaled_par_bn",
    "seq_bn_inv": "seq_bn_inv",
    "double_seq_bn_inv": "double_seq_bn_inv",
    "compacter": adapters.CompacterConfig(phm_dim=2, reduction_factor=4),
    "compacter++": adapters.CompacterPlusPlusConfig(phm_dim=2, reduction_factor=4),
    "prefix_tuning": adapters.PrefixTuningConfig(prefix_length=7, bottleneck_size=16),
    "prefix_tuning_flat": adapters.PrefixTuningConfig(prefix_length=30, flat=True),
    "prompt_tuning": adapters.PromptTuningConfig(prompt_length=6),
    "lora": "lora",
    "lora on q, k, v": adapters.LoRAConfig(attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True),
    "ia3": "ia3",
    "vera": "vera",
    "dora": "dora",
    "dvora": "dvora",
    "loreft": "loreft",
    "noreft": "noreft",
    "direft": "direft",
    "mam": "mam",
    "unipelt": "unipelt",
}
MODELS: dict[str, dict[str, Any]] = {
    "shared keys": {"share_att_key": True},
    "own keys": {"share_att_key": False},
    "shared keys, convolution": {"share_att_key": True, "conv_kernel_size": 3},
    "own keys, convolution": {"share_att_key": False, "conv_kernel_size": 3},
    "DeBERTa v1": {"head": "DebertaModel"},
}
# For batches of 3 or more samples of 29 tokens.
COMPOSITIONS: dict[str, Callable[..., Any]] = {
    "Stack": ac.Stack,
    "Fuse": ac.Fuse,
    "Split": lambda *names: ac.Split(*names, splits=[14, 15]),
    "Parallel": ac.Parallel,
    "BatchSplit": lambda *names, samples=3: ac.BatchSplit(*names, batch_sizes=[samples - 1, 1]),
    "Average": lambda *names: ac.Average(*names, weights=[0.3, 0.7]),
}
