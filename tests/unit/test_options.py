"""The options of a patched model lie in every pickle of one."""

import pickle
import subprocess
import sys

import pytest

from deberta_kernels.models.options import AttentionOptions


@pytest.mark.parametrize("home", ["options", "self_attention"])
def test_options_pickled_by_earlier_releases_load(home):
    """As 0.1 wrote them with protocol 0, and without an option that came later."""
    text = f"""ccopy_reg
_reconstructor
p0
(cdeberta_kernels.modules.{home}
AttentionOptions
p1
c__builtin__
object
p2
Ntp3
Rp4
(dp5
Vbackend
p6
Vreference
p7
sVstrict
p8
I01
sVunpad
p9
I00
sb."""
    options = pickle.loads(text.encode())
    assert options == AttentionOptions("reference", True, False, False)
    assert not options.fast_linears


@pytest.mark.parametrize(
    ("home", "name"),
    [
        ("integrations.dense", "FusedAdapterOutput"),
        ("integrations.dense", "FusedIntermediate"),
        ("integrations.dense", "FusedOutput"),
        ("integrations.huggingface", "FusedAdapterAttention"),
        ("integrations.huggingface", "FusedAttention"),
        ("integrations.huggingface", "FusedEncoder"),
        ("integrations.mask_decoder", "EnhancedMaskDecoder"),
        ("integrations.swap", "_rebuild"),
        ("modules.self_attention", "DisentangledSelfAttention"),
    ],
)
def test_names_in_pickles_of_earlier_releases_are_found(home, name):
    """In a new process, where no other test has imported the room that such a name lies in now."""
    code = f"import pickle; print(pickle.loads(b'cdeberta_kernels.{home}\\n{name}\\n.').__module__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("deberta_kernels.models.")
