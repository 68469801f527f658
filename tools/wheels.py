"""Write the source archive and the wheels of a release into dist/, and check them.

    make wheels                          all of them
    python tools/wheels.py --only x86_64 one platform

A wheel fits every Python and every torch: the native library has a C interface and is linked with neither. The wheel of
another processor is made by a cross compiler. Every wheel is built from the source archive, so that is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The system that a wheel is promised for: RHEL 8, Debian 10, Ubuntu 20.04 and later.
NEWEST_GLIBC = 28
PLATFORM = f"manylinux_2_{NEWEST_GLIBC}"
LARGEST = 3 << 20
# Compiler of each platform, and where Debian has it.
COMPILERS = {"x86_64": ("x86_64-linux-gnu-g++", "g++"), "aarch64": ("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")}
VARIANTS = {"x86_64": ["generic", "avx2", "avx512", "avx512_bf16"], "aarch64": ["generic", "neon", "neon_bf16"]}


def say(text: str) -> None:
    """Write one line of progress."""
    print(f"[wheels] {text}", flush=True)


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    """Run a command and return what it said; leave with that where it fails."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"[wheels] {' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def source_archive(dist: Path) -> Path:
    """Write the source archive; return its path."""
    run(sys.executable, "-W", "ignore", "setup.py", "-q", "sdist", "--dist-dir", str(dist))
    (path,) = dist.glob("*.tar.gz")
    return path


def wheel(source: Path, dist: Path, machine: str, cuda: Path | None) -> Path:
    """Build the wheel of a platform from an unpacked source archive; return its path.

    Args:
        source: folder with setup.py; built in.
        dist: where the wheel goes.
        machine: one of COMPILERS.
        cuda: folder with compiled CUDA kernels, which are the same for every processor; None: compile them with nvcc.
    """
    compiler, package = COMPILERS[machine]
    if shutil.which(compiler) is None:
        sys.exit(f"[wheels] there is no {compiler}; on Debian or Ubuntu: apt install {package}; or --only another one")
    if cuda is not None:
        shutil.copytree(cuda, source / "deberta_kernels" / "lib" / "cuda")
    command = (sys.executable, "-W", "ignore", "setup.py", "-q", "build_native", "--strict")
    run(*command, cwd=source, CXX=compiler)
    tag = f"{PLATFORM}_{machine}"
    command = (sys.executable, "-W", "ignore", "setup.py", "-q", "bdist_wheel", "--plat-name", tag)
    run(*command, "--dist-dir", str(dist), cwd=source, CXX=compiler, DEBERTA_KERNELS_BUILD_CUDA="1")
    (path,) = dist.glob(f"*{tag}.whl")
    return path


def check(path: Path, machine: str) -> None:
    """Look into a wheel: the name, the size, the variants, the CUDA kernels, and what it asks of a system."""
    if "-py3-none-" not in path.name:
        sys.exit(f"[wheels] {path.name} is tied to a Python")
    if path.stat().st_size > LARGEST:
        sys.exit(f"[wheels] {path.name} has {path.stat().st_size} bytes, more than {LARGEST}")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        variants = json.loads(archive.read("deberta_kernels/lib/build.json"))["variants"]
    if variants != VARIANTS[machine]:
        sys.exit(f"[wheels] {path.name} has the variants {variants}, not {VARIANTS[machine]}")
    modules = [name for name in names if name.endswith(".cubin")]
    if not modules:
        sys.exit(f"[wheels] {path.name} has no compiled CUDA kernels")
    said = run(sys.executable, "-m", "auditwheel", "show", str(path))
    found = re.search(rf'platform\s+tag:\s+"manylinux_2_(\d+)_{machine}"', said)
    if found is None or int(found[1]) > NEWEST_GLIBC:
        sys.exit(f"[wheels] {path.name} does not fit {PLATFORM}_{machine}:\n{said}")
    size = path.stat().st_size >> 10
    say(f"{path.name}: {size} KiB, {', '.join(variants)}, {len(modules)} CUDA modules, manylinux_2_{found[1]}")


def main() -> None:
    """Build and check what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=COMPILERS, action="append", help="one platform; may be given several times")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where to write; emptied first")
    options = parser.parse_args()
    dist = options.dist.resolve()
    for old in (*dist.glob("*.whl"), *dist.glob("*.tar.gz")):
        old.unlink()
    archive = source_archive(dist)
    say(f"{archive.name}: {archive.stat().st_size >> 10} KiB")
    cuda = None
    with tempfile.TemporaryDirectory() as name:
        for machine in options.only or COMPILERS:
            folder = Path(name) / machine
            with tarfile.open(archive) as unpacked:
                unpacked.extractall(folder, filter="data")
            (source,) = folder.iterdir()
            check(wheel(source, dist, machine, cuda), machine)
            cuda = source / "deberta_kernels" / "lib" / "cuda"
    run(sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    say("twine finds nothing to say against them")


if __name__ == "__main__":
    main()
