"""The Triton kernels on a text of 65,536 tokens."""

import torch
from ptx.drivers import triton_driver

from tests.ptx.kernels.long_text import check_long


def test_65_536_tokens():
    with triton_driver.installed(triton_driver.Device(90)):
        check_long("triton", torch.bfloat16)
