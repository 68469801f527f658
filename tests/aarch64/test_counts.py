"""The inner loops of the products for aarch64: what the compiler makes of them, since their time cannot be measured."""

import sys
from pathlib import Path

import pytest

from deberta_kernels import native

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import count_aarch64


@pytest.fixture(scope="module")
def rows():
    return count_aarch64.table()


def test_every_product_of_both_variants_is_counted(rows):
    assert len(rows) == 30
    assert {variant.split("`")[1] for variant, *_ in rows} == {*native.library_status()["variants"]} - {"generic"}
    assert {loop.products for _, _, loop, _ in rows} == {8, 16, 24, 32, 64, 96}


def test_nearly_all_that_a_loop_does_with_vectors_is_products(rows):
    for variant, title, loop, _ in rows:
        assert loop.stores <= 1, (variant, title, "sums are spilled")
        assert loop.products >= 0.9 * (loop.products + loop.others), (variant, title)
        # Enough loads fit in where a processor starts two products for each. Few tokens wait for the memory of weights.
        assert 2 * loop.loads <= loop.products or title.startswith("few tokens"), (variant, title)


def test_loops_have_few_instructions_beside_those_they_need(rows):
    for variant, title, loop, least in rows:
        most = 1.4 if title.startswith("few tokens") else 1.25
        assert least <= loop.instructions <= most * least, (variant, title)


def test_the_table_of_the_documentation_is_what_is_counted(rows):
    text = count_aarch64.written(rows)
    page = count_aarch64.DOCUMENT.read_text()
    if text.rpartition("Compiled by")[2] not in page:
        pytest.skip("the table was made with another compiler; `python tools/count_aarch64.py --write`")
    assert text in page, "run `python tools/count_aarch64.py --write`"


LISTING = """
0000000000000000 <(anonymous namespace)::gemm_rows<(anonymous namespace)::FloatWord, 1>(int)>:
       0:	mov	w1, #0x0
       4:	ldp	q0, q1, [x2], #32
       8:	fmla	v2.4s, v0.4s, v1.s[0]
       c:	mov	v3.16b, v2.16b
      10:	str	q3, [sp, #16]
      14:	add	x1, x1, #0x1
      18:	b.ne	4 <(anonymous namespace)::gemm_rows+0x4>  // b.any
      1c:	ret
"""


def test_a_listing_is_read_as_it_is_meant():
    ((name, body),) = count_aarch64.functions(LISTING)
    assert name == "gemm_rows<FloatWord, 1>(int)"
    assert count_aarch64.inner_loops(body) == [count_aarch64.Loop(1, 2, 1, 1, 6)]
