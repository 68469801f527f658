"""Tables that stay on a device: none is dropped while a stream may still read it."""

import types

import torch

from deberta_kernels.impl.cuda import arguments
from deberta_kernels.impl.triton.tables import device_tables
from deberta_kernels.types import PositionSpec


def test_tables_of_a_setting_are_kept_however_many_there_are():
    cpu = torch.device("cpu")
    first = device_tables(1, PositionSpec(4, 8), cpu)
    for most in range(9, 90):
        device_tables(1, PositionSpec(4, most), cpu)
    assert device_tables(1, PositionSpec(4, 8), cpu) is first


def test_every_stream_that_reads_a_table_is_recorded(monkeypatch):
    recorded = []
    table = types.SimpleNamespace(is_cuda=True, device="cuda:0", record_stream=recorded.append)
    streams = iter(["one", "other"])
    monkeypatch.setattr(arguments, "_cached_rows", lambda *_: table)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(streams))
    for _ in range(2):
        assert arguments.rows_of_distances(PositionSpec(), -64, 64, 512, torch.device("cuda:0")) is table
    assert recorded == ["one", "other"]
