"""What a package index shows, and what the source archive holds."""

import fnmatch
import re
import subprocess

import index_page as page
import pytest

from tests.checkout import ROOT


@pytest.fixture
def root(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nSource = "https://example.org/us/it/"\n')
    (tmp_path / "deberta_kernels").mkdir()
    (tmp_path / "deberta_kernels" / "__init__.py").write_text('__version__ = "1.2"\n')
    return tmp_path


@pytest.mark.parametrize(
    ("link", "whole"),
    [
        ("[a](docs/a.md#part)", "[a](https://example.org/us/it/blob/v1.2/docs/a.md#part)"),
        ("![p](docs/p.png)", "![p](https://example.org/us/it/raw/v1.2/docs/p.png)"),
        ("[here](#part)", "[here](#part)"),
        ("[there](https://a.b/c)", "[there](https://a.b/c)"),
        ("[`a`](b.md)", "[`a`](https://example.org/us/it/blob/v1.2/b.md)"),
        ("`f[0](y)`", "`f[0](y)`"),
        ("\n```python\nf[0](y)\n```\n", "\n```python\nf[0](y)\n```\n"),
    ],
)
def test_a_link_gets_its_whole_address(root, link, whole):
    (root / "README.md").write_text(f"Text {link} text\n")
    assert page.index_page(root) == f"Text {whole} text\n"


def test_an_address_that_is_missing_is_named(root):
    (root / "README.md").write_text("x")
    (root / "pyproject.toml").write_text("")
    with pytest.raises(ValueError, match=r"pyproject\.toml has no line like .*Source"):
        page.index_page(root)


def test_the_readme_has_no_relative_address_left():
    shown = page.index_page(ROOT)
    targets = re.findall(r"\]\(([^)\s]+)", shown) + re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", shown)
    assert targets
    assert [target for target in targets if not re.match(r"https://|#", target)] == []


def test_the_source_archive_holds_every_file_of_the_checkout():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if "setup.py" not in listed:
        pytest.skip("not a git checkout")
    words = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    grafted = {line[1] for line in words if line[0] == "graft"}
    included = {name for line in words if line[0] == "include" for name in line[1:]}
    # setuptools takes these by itself.
    included |= {"setup.py", "pyproject.toml", "README.md", "MANIFEST.in"}
    package_data = ("py.typed", "*.py", "*.txt", "*.json")
    missing = [
        name
        for name in listed
        if name not in included
        and name.split("/")[0] not in grafted
        and not name.endswith("/.gitkeep")
        and not (name.startswith("deberta_kernels/") and any(fnmatch.fnmatch(name, f"*{p}") for p in package_data))
    ]
    assert missing == []
