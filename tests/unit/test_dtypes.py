"""What dtypes are called, and that nobody else says it differently."""

import torch

from deberta_kernels import __main__, api, dtypes, native


def test_names_and_lists():
    assert dtypes.name(torch.bfloat16) == "bfloat16"
    assert dtypes.short_name(torch.float16) == "fp16"
    assert dtypes.listed(dtypes.KERNEL_FLOATS) == "float32, bfloat16 and float16"
    assert dtypes.listed([torch.float64], "or") == "float64"
    assert dtypes.listed([torch.float16, torch.float64], "or") == "float16 or float64"


def test_every_float_has_a_short_name_and_one_that_the_command_line_takes():
    assert set(dtypes.SHORT_NAMES) == set(dtypes.FLOATS)
    assert sorted(__main__.DTYPES) == sorted(map(dtypes.name, dtypes.FLOATS))


def test_the_native_library_and_the_functional_interface_take_what_is_listed():
    assert set(native.DTYPES) == set(dtypes.KERNEL_FLOATS)
    for dtype in dtypes.FLOATS:
        x = torch.ones(1, 1, 2, 8, dtype=dtype)
        assert api.disentangled_attention(x, x, x, backend="torch").dtype == dtype
