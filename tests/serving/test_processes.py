"""The ways around a hang that docs/serving.md names: processes whose first forward ends, stock and patched."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="about fork on Linux")

# The parent's second thread stays behind when it forks.
PROGRAM = """
import multiprocessing, sys
import torch
from transformers import AutoModelForSequenceClassification
import deberta_kernels as dk

def load(name):
    torch.set_num_threads(2)
    stock, patched = (AutoModelForSequenceClassification.from_pretrained(name).eval() for _ in range(2))
    dk.patch(patched, strict=True)
    return stock, patched

def forward(models):
    ids = torch.randint(3, 15, (16, 256), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return [model(ids).logits.sum().item() for model in models]

def in_child(way, name, models, answers):
    if way == "one thread":
        torch.set_num_threads(1)
    answers.put(forward(models or load(name)))

if __name__ == "__main__":
    way, name, seconds = sys.argv[1:]
    models = load(name)
    if way != "no forward before":
        forward(models)
    context = multiprocessing.get_context("spawn" if way == "spawn" else "fork")
    answers = context.SimpleQueue()
    child = context.Process(target=in_child, args=(way, name, None if way == "spawn" else models, answers))
    child.start()
    child.join(float(seconds))
    hangs = child.is_alive()
    child.kill()
    if hangs:
        sys.exit("the child hangs")
    assert all(abs(x - y) < 1e-3 for x, y in zip(answers.get(), forward(models), strict=True))
"""


@pytest.mark.parametrize("way", ["spawn", "no forward before", "one thread"])
def test_a_process_of_its_own_answers(way, checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program), way, checkpoint, "150"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
