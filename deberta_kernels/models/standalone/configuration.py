"""Checks of what the stand-alone module reads from a configuration."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

__all__ = ["check_configuration"]


def check_configuration(config: Any) -> None:
    """Check the fields that Hugging Face's module reads; terms of pos_att_type that it does not know, it ignores.

    Raises:
        TypeError: a field has a wrong type.
        ValueError: a field has a wrong value.
    """
    for name in ("hidden_size", "num_attention_heads"):
        _check_count(name, getattr(config, name))
    if config.hidden_size % config.num_attention_heads != 0:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads = {config.num_attention_heads}, got "
            f"{config.hidden_size}; change one of them in the config."
        )
    if hasattr(config, "attention_head_size"):
        _check_count("attention_head_size", config.attention_head_size)
    terms = config.pos_att_type
    listed = isinstance(terms, Iterable) and all(isinstance(term, str) for term in terms)
    if terms is not None and not listed:
        raise TypeError(f"pos_att_type must be a list of strings, got {terms!r}; pass ['c2p', 'p2c'] or fewer.")
    _check_probability("attention_probs_dropout_prob", config.attention_probs_dropout_prob)
    if getattr(config, "relative_attention", False):
        _check_positions(config)


def _check_positions(config: Any) -> None:
    _check_probability("hidden_dropout_prob", config.hidden_dropout_prob)
    buckets, most = getattr(config, "position_buckets", -1), getattr(config, "max_relative_positions", -1)
    for name, value in (("position_buckets", buckets), ("max_relative_positions", most)):
        _check_int(name, value)
    if buckets == 1:
        raise ValueError(
            "position_buckets must be at least 2, or below 1 for linear positions, got 1; change the config."
        )
    if most < 1:
        _check_count("max_position_embeddings", config.max_position_embeddings)


def _check_int(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}; change it in the config.")


def _check_count(name: str, value: Any) -> None:
    _check_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; change it in the config.")


def _check_probability(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}; change it in the config.")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}; change it in the config.")
