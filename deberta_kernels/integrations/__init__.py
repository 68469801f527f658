"""The public import path of `adapters`, and earlier names of modules, which pickles made by release 0.1 hold."""

import sys

from deberta_kernels.models import dense, registry, swap
from deberta_kernels.models.standalone import mask_decoder

sys.modules[__name__ + ".dense"] = dense
sys.modules[__name__ + ".huggingface"] = registry
sys.modules[__name__ + ".mask_decoder"] = mask_decoder
sys.modules[__name__ + ".swap"] = swap
