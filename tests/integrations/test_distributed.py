"""Two processes over gloo: DDP, FSDP2 and accelerate train a patched model to what one process gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

PROGRAM = Path(__file__).with_name("two_processes.py")
ROOT = Path(__file__).parents[2]
CHECKS = (
    "ddp", "ddp, reentrant checkpoints", "ddp, checkpoints", "ddp, dropout", "fsdp2", "fsdp2, checkpoints",
    "fsdp2, bfloat16", "accelerate",
)  # fmt: skip

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each process says of each check; both processes run all of them, since starting them takes longest."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    common = {
        **os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(store)],
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-2000:]
            found.append(json.loads(out.strip().splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_train_as_one(check, outcomes):
    assert [outcome[check] for outcome in outcomes] == [None, None]


def test_every_check_has_a_test(outcomes):
    assert tuple(outcomes[0]) == CHECKS
