"""The sizes of DeBERTa models: those of transformers' configuration, and each of them buildable."""

import pytest
from transformers import DebertaV2Config

from deberta_kernels.testing import geometries


@pytest.mark.parametrize("name", geometries.NAMES)
def test_transformers_takes_every_setting(name):
    settings = geometries.settings(name, vocab_size=99)
    assert DebertaV2Config(**settings).to_dict().items() >= {**settings, "vocab_size": 99}.items()
    assert settings["hidden_size"] % settings["num_attention_heads"] == 0


def test_an_unknown_name_is_refused_and_the_known_ones_named():
    with pytest.raises(ValueError, match=r"name must be one of v3-small, v3-base, .*, got 'v4'"):
        geometries.settings("v4")
