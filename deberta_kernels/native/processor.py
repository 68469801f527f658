"""What the operating system says about the processor."""

from __future__ import annotations

import platform
import re
from functools import cache

__all__ = ["described", "everyday_name", "features", "model", "named", "vendor", "with_cores"]

# (family, first model, last model): product line of a server, where there is one, and its cores. Hypervisors often show
# no more of the name than "AMD EPYC". Source of the cores: Linux, arch/x86/kernel/cpu/amd.c, at v6.12.
_AMD = {
    (23, 0x00, 0x07): ("EPYC 7001", "Zen"),
    (23, 0x08, 0x08): ("", "Zen+"),
    (23, 0x11, 0x1F): ("", "Zen"),
    (23, 0x30, 0x3F): ("EPYC 7002", "Zen 2"),
    (23, 0x60, 0x7F): ("", "Zen 2"),
    (25, 0x00, 0x07): ("EPYC 7003", "Zen 3"),
    (25, 0x08, 0x0F): ("", "Zen 3"),
    (25, 0x10, 0x17): ("EPYC 9004", "Zen 4"),
    (25, 0x18, 0x1F): ("", "Zen 4"),
    (25, 0x20, 0x5F): ("", "Zen 3"),
    (25, 0x60, 0x7F): ("", "Zen 4"),
    (25, 0xA0, 0xAF): ("EPYC 9004", "Zen 4c"),
    (26, 0x00, 0x07): ("EPYC 9005", "Zen 5"),
    (26, 0x10, 0x1F): ("EPYC 9005", "Zen 5c"),
    (26, 0x08, 0x0F): ("", "Zen 5"),
    (26, 0x20, 0x2F): ("", "Zen 5"),
    (26, 0x40, 0x4F): ("", "Zen 5"),
    (26, 0x60, 0x7F): ("", "Zen 5"),
}
# Models of family 6. Source: Linux, arch/x86/include/asm/intel-family.h, at v6.12.
_INTEL = {
    0x3F: "Haswell", 0x4F: "Broadwell", 0x6A: "Ice Lake", 0x6C: "Ice Lake", 0x8F: "Sapphire Rapids",
    0xCF: "Emerald Rapids", 0xAD: "Granite Rapids", 0xAE: "Granite Rapids", 0xAF: "Sierra Forest", 0x97: "Alder Lake",
    0x9A: "Alder Lake", 0xB7: "Raptor Lake", 0xBA: "Raptor Lake", 0xBF: "Raptor Lake", 0xAA: "Meteor Lake",
    0xBD: "Lunar Lake", 0xC5: "Arrow Lake", 0xC6: "Arrow Lake", 0x8C: "Tiger Lake", 0x8D: "Tiger Lake",
    0xA7: "Rocket Lake",
}  # fmt: skip
_SKYLAKE_SERVER = 0x55  # three generations have this model, and tell by their stepping
# (implementer, part) of ARM cores. Source: util-linux, sys-utils/lscpu-arm.c, at v2.40.
_ARM = {
    (0x41, 0xD0C): "ARM Neoverse N1", (0x41, 0xD40): "ARM Neoverse V1", (0x41, 0xD49): "ARM Neoverse N2",
    (0x41, 0xD4F): "ARM Neoverse V2", (0x41, 0xD84): "ARM Neoverse V3", (0x41, 0xD8E): "ARM Neoverse N3",
    (0x41, 0xD08): "ARM Cortex-A72", (0x41, 0xD0B): "ARM Cortex-A76",
}  # fmt: skip


def model() -> str:
    """Return the processor's name."""
    return described().get("model name") or platform.processor() or platform.machine()


def everyday_name() -> str:
    """Return the name people use for this processor, such as "AMD EPYC 9004 (Zen 4)"."""
    entries = described()
    try:
        part = (int(entries["CPU implementer"], 16), int(entries["CPU part"], 16))
    except (KeyError, ValueError):
        part = (0, 0)
    if part in _ARM:
        return _ARM[part]
    return named(model(), entries.get("cpu family", ""), entries.get("model", ""), entries.get("stepping", ""))


def named(name: str, family: str = "", model: str = "", stepping: str = "") -> str:
    """Return the name people use for a processor: "AMD EPYC", 25, 17 is "AMD EPYC 9004 (Zen 4)".

    Args:
        name: "model name" of /proc/cpuinfo.
        family: "cpu family" of /proc/cpuinfo, a decimal number; "" where it is unknown.
        model: "model" of /proc/cpuinfo, likewise.
        stepping: "stepping" of /proc/cpuinfo, likewise.

    Returns:
        The maker's name without marks, frequency and count of cores; with the product line where the machine hides it,
        and the kind of cores where that is known.
    """
    if not name.startswith(("AMD", "Intel")):
        return name
    bare = re.sub(r"\(r\)|\(tm\)|@.*|\bcpu\b|\b\d+-core\b|\bprocessor\b", " ", name, flags=re.IGNORECASE)
    bare = " ".join(bare.split())
    numbers = [int(text) if text.isdecimal() else -1 for text in (family, model, stepping)]
    if name.startswith("AMD"):
        line, cores = _amd(*numbers[:2])
        if bare == "AMD EPYC" and line:
            bare = f"AMD {line}"
    else:
        cores = _intel(*numbers)
    return f"{bare} ({cores})" if cores else bare


def _amd(family: int, model: int) -> tuple[str, str]:
    rows = (row for (known, first, last), row in _AMD.items() if known == family and first <= model <= last)
    return next(rows, ("", ""))


def _intel(family: int, model: int, stepping: int) -> str:
    if family == 6 and model == _SKYLAKE_SERVER and stepping >= 0:
        return "Skylake" if stepping < 5 else "Cascade Lake" if stepping < 10 else "Cooper Lake"
    return _INTEL.get(model, "") if family == 6 else ""


def with_cores(name: str, threads: int) -> str:
    """Return a processor's name with how many of its cores computed, as "AMD EPYC 9004 (Zen 4), 1 core"."""
    return f"{name}, {threads} core{'' if threads == 1 else 's'}"


def vendor() -> str | None:
    """Return the maker's name in an x86 processor, as "GenuineIntel"; None elsewhere or where it is unknown."""
    return described().get("vendor_id")


@cache
def features() -> frozenset[str]:
    """Return the names of its instruction-set extensions; empty where they are unknown."""
    entries = described()
    return frozenset((entries.get("flags") or entries.get("Features") or "").split())


@cache
def described() -> dict[str, str]:
    """Return the first processor's entries in /proc/cpuinfo; nothing where there is no such file."""
    entries: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, separator, value = line.partition(":")
                if separator:
                    entries.setdefault(key.strip(), value.strip())
                elif entries:
                    break
    except OSError:
        pass
    return entries
