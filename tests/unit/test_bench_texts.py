"""The texts of a file: its lines or a column; and what is said when there are none."""

import errno
import os

import pytest

from deberta_kernels.bench.texts import TextsError, read


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_each_line_is_a_text_and_empty_ones_are_left_out(write):
    found = read(write("texts.txt", "one\n\n two, too \n   \nthree"), None, 0)
    assert found.texts == ("one", "two, too", "three")
    assert (found.column, found.skipped, found.more) == (None, 2, False)


@pytest.mark.parametrize(
    ("limit", "texts", "more"), [(1, ("a",), True), (2, ("a", "b"), False), (9, ("a", "b"), False)]
)
def test_the_limit_counts_texts(write, limit, texts, more):
    found = read(write("texts.txt", "a\nb\n"), None, limit)
    assert (found.texts, found.more) == (texts, more)


@pytest.mark.parametrize(
    ("name", "content", "column", "chosen"),
    [
        ("one.csv", "headline\nfirst\nsecond\n", None, "headline"),
        ("usual.csv", "id,Review,label\n1,first,x\n2,second,y\n", None, "Review"),
        ("named.csv", 'id,note\n1,first\n2,"second"\n', "note", "note"),
        ("tabs.tsv", "id\ttext\n1\tfirst\n2\tsecond\n", None, "text"),
        ("spaced.csv", 'id, text\n1, first\n2, "second"\n', None, "text"),
        ("bom.csv", b"\xef\xbb\xbftext\nfirst\nsecond\n", None, "text"),
        ("only.jsonl", '{"id": 1, "note": "first"}\n{"id": 2, "note": "second"}\n', None, "note"),
        ("usual.jsonl", '{"text": "first", "name": "x"}\n\n{"text": "second", "name": "y"}\n', None, "text"),
        ("named.json", '{"a": "first", "b": "x"}\n{"a": "second"}\n', "a", "a"),
    ],
)
def test_the_column_is_named_or_clear(write, name, content, column, chosen):
    found = read(write(name, content), column, 0)
    assert found.texts == ("first", "second")
    assert found.column == chosen


def test_a_lone_surrogate_becomes_a_text_that_tokenizers_take(write):
    (text,) = read(write("a.jsonl", '{"text": "\\ud800 and more"}\n'), None, 0).texts
    assert text == "\ufffd and more"
    text.encode()


def test_a_header_with_other_separators_can_be_insisted_on(write):
    assert read(write("a.csv", "text; any\nfirst\n"), "text; any", 0).texts == ("first",)


def test_a_text_of_several_lines_is_one_cell(write):
    assert read(write("a.csv", 'text\n"two\nlines, one text"\n'), None, 0).texts == ("two\nlines, one text",)


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("empty.txt", "", None, r"--text needs at least one text, and .*empty.txt has none"),
        ("blank.txt", "\n \n", None, r"needs at least one text"),
        ("empty.csv", "", None, r"empty.csv has no column of texts"),
        ("head.csv", "text\n", None, r"column 'text' of .*head.csv has none"),
        ("empty.jsonl", "\n", None, r"empty.jsonl is empty"),
        ("two.csv", "title,note\na,b\n", None, r"--column must say which column .* its columns are: title, note"),
        ("both.csv", "text,review\na,b\n", None, r"its columns are: text, review"),
        ("two.jsonl", '{"a": "x", "b": "y", "n": 1}\n', None, r"its columns are: a, b"),
        ("none.jsonl", '{"n": 1}\n', None, r"has no column of texts"),
        ("missing.csv", "id,note\n1,b\n", "text", r"--column text is not in .*; its columns are: id, note"),
        ("missing.jsonl", '{"n": 1, "a": "x"}\n', "text", r"--column text is not in .*; its columns are: n, a"),
        ("number.jsonl", '{"a": "x", "n": 1}\n', "n", r"column 'n' of .* must hold texts, got int in record 1"),
        ("later.jsonl", '{"a": "x"}\n{"a": [1]}\n', "a", r"must hold texts, got list in record 2"),
        ("broken.jsonl", '{"a": "x"}\n{"a": \n', None, r"a JSON object in each line, and line 2 is none"),
        ("list.json", '[{"a": "x"}]', None, r"a JSON object in each line, and line 1 is none"),
        ("list.json", '[{"a": "x"}]', None, r"line 1 is none; write a list so: jq -c"),
        ("deep.jsonl", "[" * 100_000, None, r"a JSON object in each line, and line 1 is none"),
        ("semicolons.csv", "text;label\na, b;1\n", None, r"columns separated by ',', got the one column 'text;label'"),
        ("tabs.csv", "text\tlabel\na, b\t1\n", None, r"name the file .tsv where tabs separate them"),
        ("lines.txt", "a\n", "text", r"--column text needs a file with columns"),
        ("latin.txt", "caf\xe9\n".encode("latin1"), None, r"must be UTF-8, got byte 0xe9 .* iconv -f latin1"),
        ("wide.txt", "caf\xe9\n".encode("utf-16"), None, r"must be UTF-8, got byte 0xf[ef] .* iconv -f utf-16"),
        ("rows.parquet", b"PAR1\xff\xff", None, r"must be UTF-8, got byte 0xff .* it is no text file"),
        ("packed.txt", b"\x1f\x8b\x08", None, r"must be UTF-8, got byte 0x8b .* or unpack it"),
    ],
)
def test_a_file_without_texts_is_refused_by_name(write, name, content, column, message):
    with pytest.raises(TextsError, match=message):
        read(write(name, content), column, 0)


def test_what_cannot_be_opened_is_refused_by_name(tmp_path):
    with pytest.raises(TextsError, match=r"nowhere.txt cannot be read: No such file"):
        read(tmp_path / "nowhere.txt", None, 0)
    with pytest.raises(TextsError, match=r"cannot be read: Is a directory"):
        read(tmp_path, None, 0)


def test_a_file_that_may_not_be_read_is_refused_by_name(tmp_path, monkeypatch):
    def refuse(path, *arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("pathlib.Path.open", refuse)  # root may read every file
    with pytest.raises(TextsError, match=r"locked.txt cannot be read: Permission denied"):
        read(tmp_path / "locked.txt", None, 0)
