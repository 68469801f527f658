"""Rows as an aligned table."""

from deberta_kernels.demo.tables import aligned


def test_the_first_column_is_set_to_the_left_and_numbers_to_the_right():
    assert aligned([["a", "b"], ["long", "12"]]).splitlines() == ["a      b", "long  12"]
    assert aligned([["a", "b"], ["1", "long"]], left=(0, 1)).splitlines()[0] == "a  b"


def test_a_row_of_another_length_widens_no_column():
    rows = [["a", "b"], ["long", "12"], ["error", "text beyond", "all columns"]]
    assert aligned(rows).splitlines()[1] == "long  12"


def test_a_line_of_dashes_stands_under_the_heads():
    assert aligned([["a", "b"], ["", "ms"], ["x", "1.5"]], heads=2).splitlines()[2] == "-  ---"
