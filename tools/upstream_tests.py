"""Run somebody's tests of DeBERTa twice, without and with the patch: none may fail that passes without.

    python tools/upstream_tests.py ../transformers/tests/models/deberta_v2 ../transformers/tests/models/deberta

The tests of transformers come with its repository, not with its package. Their small models have no relative attention
unless told to; here every configuration gets it, in both runs, since there is no kernel for a model without.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# A plugin, for pytest to import before it collects: says at the end whether kernels ran.
PLUGIN = """
import os
import transformers
import deberta_kernels as dk

calls = 0

def with_positions(cls):
    original = cls.__init__
    def __init__(self, *arguments, **named):
        named["relative_attention"] = True
        named["pos_att_type"] = named.get("pos_att_type") or ["p2c", "c2p"]
        original(self, *arguments, **named)
    cls.__init__ = __init__

for cls in (transformers.DebertaV2Config, transformers.DebertaConfig):
    with_positions(cls)
if os.environ["UPSTREAM_PATCHED"] == "1":
    dk.patch_all()

def pytest_sessionfinish(session):
    print("\\nkernel calls:", sum(dk.stats()["calls"].values()))
    for reason, count in dk.stats()["fallbacks"].items():
        print("original code:", count, reason)
"""


def run(paths: list[str], patched: bool, options: list[str]) -> tuple[dict[str, str], str]:
    """Run the tests in a process of their own; return the outcome of each, and the end of what was printed."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "upstream_plugin.py").write_text(PLUGIN)
        report = Path(name) / "report.xml"
        folders = [name, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "UPSTREAM_PATCHED": str(int(patched))}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "upstream_plugin", f"--junitxml={report}", *options]
        done = subprocess.run([*command, *paths], env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not report.exists():  # 1: some tests failed
            sys.exit(f"the tests did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        found = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            found[f"{case.get('classname')}::{case.get('name')}"] = min(kinds, default="passed")
    return found, done.stdout


def main() -> int:
    """Run, compare, and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", help="files or folders of tests")
    parser.add_argument("--pytest", action="append", default=[], help="one more option of pytest, as --pytest=-x")
    options = parser.parse_args()
    plain, _ = run(options.paths, False, options.pytest)
    patched, text = run(options.paths, True, options.pytest)
    calls = next((line for line in text.splitlines() if line.startswith("kernel calls:")), "kernel calls: 0")
    worse = [name for name, outcome in plain.items() if outcome == "passed" and patched.get(name) != "passed"]
    for label, found in (("without", plain), ("with", patched)):
        print(f"{label:<8} the patch: {dict(sorted(Counter(found.values()).items()))}")
    print(calls, *(line for line in text.splitlines() if line.startswith("original code:")), sep="\n")
    for name in worse:
        print(f"passes without the patch only: {name} ({patched.get(name, 'not run')})")
    # Runs that tested nothing are no proof.
    return int(bool(worse) or "passed" not in plain.values() or calls == "kernel calls: 0")


if __name__ == "__main__":
    sys.exit(main())
