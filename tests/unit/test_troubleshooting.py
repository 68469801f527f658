"""docs/troubleshooting.md quotes what the package says: every text must still be said by some source."""

import ast
import json
import re

import pytest

from tests.checkout import ROOT

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### `(.*)`$", TEXT, re.MULTILINE)
# Tables of texts: the first column of those that have a heading "text".
ROWS = [
    quoted
    for table in re.findall(r"^\| text \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    for quoted in re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)
]
VARYING = "\0"


def said(path):
    """Every string of a source, with a mark where a value is put in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else VARYING for part in node.values)


SOURCES = [*(ROOT / "deberta_kernels").rglob("*.py"), ROOT / "setup.py", ROOT / "csrc" / "native_build.py"]
SAID = [text for path in SOURCES for text in said(path)]


def pattern(quoted):
    """`...` stands for values and for the words around them; all else is as it is written."""
    return re.compile(".*".join(re.escape(part) for part in quoted.split("...")), re.DOTALL)


def is_said(quoted):
    return any(pattern(quoted).search(text) for text in SAID)


@pytest.mark.parametrize("quoted", [*HEADINGS, *ROWS])
def test_a_quoted_text_is_what_the_package_says(quoted):
    assert re.search(r"\w{3}", quoted.replace("...", "")), "nothing but dots was quoted"
    assert is_said(quoted)


def test_there_is_something_to_look_for():
    assert len(HEADINGS) > 30
    assert len(ROWS) > 8
    assert len(set(HEADINGS)) == len(HEADINGS)


def test_a_text_that_nothing_says_is_found():
    assert not is_said("the native library ... has been eaten")
    assert not is_said("the native library is not built. ...")


# What a user meets as a warning: each must have its place in the document.
WARNINGS = (
    "a slower one, because", "runs the original attention code: ", "was left alone: ", "is called as a module: ",
    "has a model_init, ",
)  # fmt: skip


@pytest.mark.parametrize("text", WARNINGS)
def test_every_warning_has_a_place(text):
    assert is_said(text)
    assert any(text.rstrip() in heading for heading in HEADINGS)


def test_the_warnings_are_all_that_there_are():
    """A call of `fallback` or `warn_once` that is new here needs a text in the document, and a line above."""
    calls = [
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for path in (ROOT / "deberta_kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    assert (calls.count("fallback"), calls.count("warn_once")) == (5, 3)


def medians(name):
    """Seconds of our own call and of Hugging Face's, by shape, in the result that the document links under a name."""
    (path,) = re.findall(rf"\[{name}\]\(\.\./(benchmarks/results/\S+\.json)\)", TEXT)
    result = json.loads((ROOT / path).read_text(encoding="utf-8"))
    found = {}
    for row in result["core"]:
        assert row["checks"]["bare"]["ok"]
        times = {one: sample["median"] for one, sample in row["samples"].items()}
        found[row["label"], row["dtype"], row["backward"]] = times["bare"], times.get("huggingface")
    return result, found


def test_the_cost_of_tiled_pytorch_is_that_of_the_stored_results():
    (tiled, slow), (native, fast) = medians("tiled PyTorch"), medians("kernel")
    assert (tiled["settings"]["backend"], native["settings"]["backend"]) == ("torch", "cpu")
    assert tiled["settings"]["threads"] == native["settings"]["threads"] == 1
    assert tiled["commit"] == native["commit"]
    assert {label for label, _, _ in slow} == {"1x128", "1x512"}
    times = [slow[shape][0] / fast[shape][0] for shape in slow]
    speeds = {backward: [h / own for (_, _, b), (own, h) in slow.items() if h and b == backward] for backward in (0, 1)}
    written = " ".join(TEXT.split())
    assert f"takes {min(times):.0f} to {max(times):.0f} times as long as in the" in written
    assert (
        f"is {min(speeds[0]):.1f} to {max(speeds[0]):.1f} times as fast as Hugging Face's code in inference" in written
    )
    assert f"and {min(speeds[1]):.1f} to {max(speeds[1]):.1f} times as fast in training" in written
