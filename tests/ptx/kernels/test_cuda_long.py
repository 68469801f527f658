"""The CUDA kernels on a text of 65,536 tokens."""

import torch
from ptx.drivers import cuda_driver

from tests.ptx.kernels.long_text import check_long


def test_65_536_tokens():
    with cuda_driver.installed(cuda_driver.Device()):
        check_long("cuda", torch.bfloat16)
