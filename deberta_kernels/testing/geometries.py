"""Sizes of DeBERTa models, as settings of transformers' `DebertaV2Config`: released ones, and small ones for tests."""

from __future__ import annotations

from typing import Any

__all__ = ["NAMES", "settings"]

# What all released models of v2 and v3 have in common.
_COMMON: dict[str, Any] = {
    "vocab_size": 128100,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 256,
    "max_relative_positions": -1,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "pad_token_id": 0,
}
_V2 = {"conv_kernel_size": 3, "conv_act": "gelu"}
# Name: (layers, width, heads, width of the feed-forward layer), and what differs from the above.
_SIZES: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "v3-small": ((6, 768, 12, 3072), {}),
    "v3-base": ((12, 768, 12, 3072), {}),
    "v3-large": ((24, 1024, 16, 4096), {}),
    "v2-xlarge": ((24, 1536, 24, 6144), _V2),
    "v2-xxlarge": ((48, 1536, 24, 6144), _V2),
    # For examples and tests: seconds on one core.
    "small": ((4, 256, 4, 1024), {}),
    "tiny": ((2, 32, 4, 48), {"vocab_size": 64, "max_position_embeddings": 64, "position_buckets": 16}),
}
NAMES = tuple(_SIZES)


def settings(name: str, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a model.

    Args:
        name: one of `NAMES`.
        changes: settings that differ, such as a smaller `vocab_size`, whose look-up costs the same.

    Raises:
        ValueError: there is no such model.
    """
    if name not in _SIZES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}.")
    (layers, hidden, heads, intermediate), differing = _SIZES[name]
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**_COMMON, **sizes, "intermediate_size": intermediate, **differing, **changes}
