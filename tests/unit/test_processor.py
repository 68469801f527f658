"""The names of processors: as people say them, from what the operating system says."""

import pytest

from deberta_kernels.native import processor

NAMES = {
    ("AMD EPYC", "25", "17", "1"): "AMD EPYC 9004 (Zen 4)",
    ("AMD EPYC", "25", "1", "1"): "AMD EPYC 7003 (Zen 3)",
    ("AMD EPYC", "26", "2", "1"): "AMD EPYC 9005 (Zen 5)",
    ("AMD EPYC", "26", "17", "0"): "AMD EPYC 9005 (Zen 5c)",
    ("AMD EPYC", "25", "160", "2"): "AMD EPYC 9004 (Zen 4c)",
    ("AMD EPYC 7B13 64-Core Processor", "25", "1", "0"): "AMD EPYC 7B13 (Zen 3)",
    ("AMD EPYC-Rome Processor", "23", "49", "0"): "AMD EPYC-Rome (Zen 2)",
    ("AMD Ryzen 9 7950X 16-Core Processor", "25", "97", "2"): "AMD Ryzen 9 7950X (Zen 4)",
    ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", "6", "106", "6"): "Intel Xeon Platinum 8375C (Ice Lake)",
    ("Intel(R) Xeon(R) Processor @ 2.70GHz", "6", "143", "8"): "Intel Xeon (Sapphire Rapids)",
    ("Intel(R) Xeon(R) CPU @ 2.00GHz", "6", "85", "3"): "Intel Xeon (Skylake)",
    ("Intel(R) Xeon(R) CPU @ 2.80GHz", "6", "85", "7"): "Intel Xeon (Cascade Lake)",
    ("Intel(R) Xeon(R) Platinum 8380H", "6", "85", "11"): "Intel Xeon Platinum 8380H (Cooper Lake)",
    ("AMD EPYC", "99", "17", "1"): "AMD EPYC",
    ("AMD EPYC", "", "", ""): "AMD EPYC",
    ("Intel(R) Core(TM) Something", "6", "9999", "1"): "Intel Core Something",
    ("some processor", "", "", ""): "some processor",
    ("AMD EPYC", "26", "80", "1"): "AMD EPYC",
    ("aarch64", "", "", ""): "aarch64",
}


@pytest.mark.parametrize("given", NAMES, ids="-".join)
def test_processors_are_named_as_people_do(given):
    assert processor.named(*given) == NAMES[given]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"CPU implementer": "0x41", "CPU part": "0xd40"}, "ARM Neoverse V1"),
        ({"model name": "AMD EPYC", "cpu family": "25", "model": "17"}, "AMD EPYC 9004 (Zen 4)"),
        ({"CPU implementer": "0x99", "CPU part": "0x1", "model name": "Made Up"}, "Made Up"),
    ],
)
def test_this_processor_is_named_by_what_the_system_says(entries, expected, monkeypatch):
    monkeypatch.setattr(processor, "described", lambda: entries)
    assert processor.everyday_name() == expected


def test_cores_are_counted_in_words():
    assert processor.with_cores("AMD EPYC 9004 (Zen 4)", 1) == "AMD EPYC 9004 (Zen 4), 1 core"
    assert processor.with_cores("AMD EPYC 9004 (Zen 4)", 8) == "AMD EPYC 9004 (Zen 4), 8 cores"
