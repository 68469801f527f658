"""Earlier names of modules, which pickles made by release 0.1 hold; they go with the release after the next."""

import sys

from deberta_kernels.models import options
from deberta_kernels.models.standalone import self_attention

sys.modules[__name__ + ".options"] = options
sys.modules[__name__ + ".self_attention"] = self_attention
