"""Every file of tests is found by a run without arguments: one that is not found fails nowhere."""

import shutil
import subprocess

import pytest


def test_every_file_of_tests_is_under_a_folder_that_pytest_searches(request):
    root = request.config.rootpath
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("this is no checkout")
    done = subprocess.run(["git", "ls-files", "*test_*.py"], cwd=root, capture_output=True, text=True, check=True)
    files = [name for name in done.stdout.split() if name.rpartition("/")[2].startswith("test_")]
    assert "tests/tools/test_collection.py" in files
    searched = tuple(f"{folder}/" for folder in request.config.getini("testpaths"))
    assert [name for name in files if not name.startswith(searched)] == []
