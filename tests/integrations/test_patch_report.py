"""What `patch` reports: what it found, and which backend will run it."""

import pickle
import re
from dataclasses import replace

import pytest
import torch

import deberta_kernels as dk


def test_the_report_counts_and_reads_well(build):
    report = dk.patch(build(num_hidden_layers=3))
    assert report.patched == 3
    assert report.left_alone == {}
    assert str(report).splitlines()[0] == "patched 3 attention modules and 1 encoder"
    alone = dk.patch(build().encoder.layer[0].attention.self)
    assert str(alone).startswith("patched 1 attention module, without the encoder around it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_report_says_which_backend_will_run(build, dtype):
    model = build().to(dtype)
    lines = str(dk.patch(model)).splitlines()
    q = torch.zeros(1, 2, 9, 8, dtype=dtype)
    assert lines[1].startswith(f"  {str(dtype)[6:]} on cpu: backend {dk.explain(q, q, q).chosen!r}")
    assert str(dk.patch(model, backend="torch")).endswith("on cpu: backend 'torch', which was asked for")
    assert pickle.loads(pickle.dumps(dk.patch(model))) == dk.patch(model)


def test_the_report_of_a_model_without_a_device_is_silent_about_backends(build):
    assert len(str(dk.patch(build().to("meta"))).splitlines()) == 1


def test_a_report_can_be_read_where_its_device_is_not(build):
    report = dk.patch(build())
    gone = replace(report, example=report.example._replace(device=torch.device("xla")))  # no build of PyTorch has it
    assert re.search(r"^  float32 on xla: no tensor can be made there \(Could not run ", str(gone), re.MULTILINE)
