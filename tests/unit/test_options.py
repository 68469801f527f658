"""The options of a patched model lie in every pickle of one."""

import pickle

import pytest

from deberta_kernels.modules.options import AttentionOptions


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
    assert options == AttentionOptions("reference", True, False)
    assert not options.fast_linears
