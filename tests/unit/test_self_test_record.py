"""What a self-test leaves behind, and when it is not needed."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

import deberta_kernels as dk
from deberta_kernels import backends, env, info
from deberta_kernels.proof import record, self_test
from deberta_kernels.testing.inputs import Case
from tests.checkout import ROOT
from tests.unit.new_device import FAILED, IDENTITY, chosen, new_process, spoiled

# ---- What is kept


def test_a_proof_is_kept_for_later_processes(kernels, monkeypatch):
    chosen()
    new_process(monkeypatch)
    chosen()
    assert kernels.forwards == 1
    assert self_test.status()["kept"] == 1


@pytest.mark.parametrize("changed", [*(name for name in IDENTITY if name != "backend")])
def test_a_proof_is_worth_nothing_elsewhere(kernels, monkeypatch, changed):
    chosen()
    new_process(monkeypatch)
    monkeypatch.setitem(IDENTITY, changed, "another")
    chosen()
    assert kernels.forwards == 2


def test_a_damaged_file_is_no_proof(kernels, monkeypatch, tmp_path):
    chosen()
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    new_process(monkeypatch)
    chosen()
    assert kernels.forwards == 2


def test_a_wrong_answer_is_not_kept(kernels, monkeypatch):
    kernels.out = spoiled
    with pytest.warns(dk.DebertaKernelsWarning, match=FAILED):
        assert chosen() == "torch"
    new_process(monkeypatch)
    kernels.out = lambda x: x
    assert chosen() == "triton"


def test_without_a_folder_every_process_tests(kernels, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chosen() == "triton"
        new_process(monkeypatch)
    assert kernels.forwards == 2
    assert self_test.status()["kept"] == 0


def test_without_a_home_nothing_is_kept(kernels, monkeypatch):
    monkeypatch.setattr(env, "cache_folder", lambda: None)
    assert chosen() == "triton"


def test_a_proof_names_everything_that_takes_part(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA Made Up", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    record._device.cache_clear()
    try:
        found = record.identity("triton", torch.device("cuda", 3))
    finally:
        record._device.cache_clear()
    assert (found["device"], found["capability"], found["torch"]) == ("NVIDIA Made Up", "9.0", torch.__version__)
    assert set(found) == set(IDENTITY)
    assert record.described(found).startswith("NVIDIA Made Up of capability 9.0, deberta_kernels 0.1.0, torch 2.")


# ---- Committed results


def test_a_committed_result_makes_the_test_unnecessary(kernels, monkeypatch):
    row = {name: IDENTITY[name] for name in ("backend", "device", "capability", "triton", "kernels")}
    monkeypatch.setattr(record, "covered", lambda: [{**row, "result": "some.json"}])
    assert chosen() == "triton"
    assert kernels.forwards == 0
    monkeypatch.setitem(IDENTITY, "triton", "4")
    assert chosen(Case(nq=3)) == "triton"
    assert kernels.forwards == 1


@pytest.mark.parametrize("missing", ["backend", "device", "capability", "kernels"])
def test_a_row_that_does_not_say_what_it_is_about_proves_nothing(missing):
    row = {name: value for name, value in IDENTITY.items() if name != missing}
    assert record.covers(IDENTITY, IDENTITY)
    assert not record.covers(row, IDENTITY)


def unfounded(rows):
    """Return the rows that no committed result bears out."""
    return [row for row in rows if not _borne_out(row)]


def _borne_out(row):
    if not {"backend", "device", "capability", "kernels", "result"} <= set(row):
        return False
    path = ROOT / "benchmarks" / "results" / row["result"]
    if not path.is_file():
        return False
    proven = json.loads(path.read_text()).get("proven", [])
    return {name: value for name, value in row.items() if name != "result"} in proven


def test_every_row_is_borne_out_by_its_result(monkeypatch):
    assert unfounded(record.covered()) == []
    row = {"backend": "triton", "device": "x", "capability": "9.0", "kernels": "abc", "result": "x/gpu.json"}
    assert unfounded([row, {"device": "x"}]) == [row, {"device": "x"}]


def test_the_digest_is_of_the_source_of_a_backend():
    digests = {name: record._digest(name) for name, x in backends.REGISTRY.items() if x.self_tested}
    assert len(set(digests.values())) == len(digests) == 2


# ---- Turned off


def test_a_variable_turns_it_off(kernels, monkeypatch):
    monkeypatch.setenv(env.SELF_TEST, "0")
    assert chosen() == "triton"
    assert kernels.forwards == 0


def test_turned_off_even_a_wrong_backend_answers(kernels, monkeypatch):
    kernels.out = spoiled
    with pytest.warns(dk.DebertaKernelsWarning, match=FAILED):
        assert chosen() == "torch"
    monkeypatch.setenv(env.SELF_TEST, "0")
    assert chosen() == "triton"


def test_another_value_is_an_error(kernels, monkeypatch):
    monkeypatch.setenv(env.SELF_TEST, "off")
    with pytest.raises(ValueError, match=r"DEBERTA_KERNELS_SELF_TEST must be 0 or 1, got 'off'; unset it"):
        chosen()
    assert self_test.status()["on"].startswith("DEBERTA_KERNELS_SELF_TEST must be")


def test_info_says_whether_it_runs(kernels, monkeypatch):
    chosen()  # and what info itself asks the backends, in four dtypes, are others
    assert "self-test    on at the first use on a GPU; committed results cover no devices, 5 variants" in _text()
    monkeypatch.setenv(env.SELF_TEST, "0")
    assert "self-test    off, DEBERTA_KERNELS_SELF_TEST=0: GPU kernels answer on any device" in _text()
    monkeypatch.setenv(env.SELF_TEST, "yes")
    assert "self-test    DEBERTA_KERNELS_SELF_TEST must be 0 or 1, got 'yes'" in _text()


def _text():
    return info.format_info()


def test_the_sources_of_a_checkout_are_part_of_the_digest(tmp_path, monkeypatch):
    package = tmp_path / "deberta_kernels"
    for folder in (package / "impl" / "cuda", tmp_path / "csrc" / "cuda"):
        folder.mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "forward.cu").write_text("kernel")
    monkeypatch.setattr(record, "_PACKAGE", package)
    monkeypatch.setattr(record, "_SHARED", ())
    before = record._digest.__wrapped__("cuda")
    (tmp_path / "csrc" / "cuda" / "forward.cu").write_text("another")
    assert record._digest.__wrapped__("cuda") != before
