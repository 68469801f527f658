"""A process that runs the blocks of documents, beside a hub of tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.checkout import ROOT
from tests.docs import hub


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture(scope="session")
def runner(home: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH")))
    )
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "runner.py")]
    process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield process
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture
def run_program(runner: subprocess.Popen[str], home: Path, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run a program by itself, in a folder of its own: run_program(code, checkpoints) -> exit status, all printed."""

    def run_program(code: str, checkpoints: Sequence[str] = ()) -> tuple[int, str]:
        for name in checkpoints:
            hub.publish(name, home)
        program, folder, output = tmp_path / "block.py", tmp_path / "folder", tmp_path / "output.txt"
        program.write_text(code, encoding="utf-8")
        folder.mkdir()
        runner.stdin.write(f"{program}\t{folder}\t{output}\n")
        runner.stdin.flush()
        return int(runner.stdout.readline()), output.read_text(encoding="utf-8", errors="replace")

    return run_program
