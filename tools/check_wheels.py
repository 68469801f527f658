"""Install the wheels of dist/ where no compiler is, and run a patched model: here, and on an emulated aarch64.

    make wheels                                build them, then this
    python tools/check_wheels.py x86_64        one of them

The aarch64 wheel runs on Debian's arm64 Python, unpacked into a folder, and PyTorch's own arm64 wheel, under
qemu-aarch64-static (apt install qemu-user-static). It takes two minutes and 1 GB below build/.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARM64 = ROOT / "build" / "arm64"
TORCH = {"x86_64": "torch==2.13.0", "aarch64": "torch==2.9.1"}
NEEDED_BY_TORCH = ("filelock", "typing_extensions", "sympy", "networkx", "jinja2", "fsspec", "mpmath", "MarkupSafe")
# What the emulated machine needs of Debian.
DEBIAN = ("python3", "libstdc++6")
TRIAL = """
import shutil, torch, deberta_kernels as dk
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification as Model
assert not any(map(shutil.which, ("c++", "g++", "clang++", "cc", "gcc", "nvcc"))), "a compiler is on the PATH"
torch.manual_seed(0)
config = DebertaV2Config(
    vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    relative_attention=True, position_buckets=16, max_relative_positions=-1, pos_att_type=["p2c", "c2p"],
    share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
)
model = Model(config).eval()
ids = torch.randint(1, 100, (2, 70))
mask = torch.ones_like(ids)
mask[1, 40:] = 0
with torch.no_grad():
    before = model(ids, attention_mask=mask).logits
    dk.patch(model, strict=True)
    after = model(ids, attention_mask=mask).logits
calls, difference = dk.stats()["calls"], float((after - before).abs().max())
assert calls["cpu"] == 2 and sum(calls.values()) == 2, calls
assert difference < 1e-5, difference
print(f"fused under strict=True on {dk.native.library_status()['isa']}, largest difference {difference:.1e}")
"""


def say(text: str) -> None:
    """Write one line of progress."""
    print(f"[wheels] {text}", flush=True)


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed; leave with what it said where it fails."""
    # Not from the checkout, whose own package would come first.
    done = subprocess.run(command, env=environment, cwd=tempfile.gettempdir(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"[wheels] {' '.join(command)[:300]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def the_wheel(dist: Path, machine: str) -> Path:
    """Return the wheel of a platform."""
    found = sorted(dist.glob(f"*_{machine}.whl"))
    if len(found) != 1:
        sys.exit(f"[wheels] {dist} holds {len(found)} wheels for {machine}, expected one; run `make wheels`")
    return found[0]


def check_here(dist: Path) -> None:
    """Install the wheel for this processor into a new environment, and try it with an empty PATH."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        quiet = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        run([*quiet, TORCH["x86_64"]])
        run([*quiet, "--no-build-isolation", f"{the_wheel(dist, 'x86_64')}[transformers]"])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DEBERTA"))}
        said = run([python, "-c", TRIAL], {**kept, "PATH": str(Path(folder) / "bin"), "HF_HUB_OFFLINE": "1"})
    say(f"x86_64, {TORCH['x86_64']}: {said.strip()}")


def check_aarch64(dist: Path) -> None:
    """Run the wheel for aarch64 under emulation."""
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None or shutil.which("apt-get") is None:
        sys.exit("[wheels] aarch64 is tried under emulation on Debian or Ubuntu only: apt install qemu-user-static")
    system, packages, own = ARM64 / "system", ARM64 / "packages", ARM64 / "own"
    if not (ARM64 / "complete").exists():
        shutil.rmtree(ARM64, ignore_errors=True)
        unpack_debian(system)
        quiet_install(packages, [TORCH["aarch64"], *NEEDED_BY_TORCH, *closure("transformers")])
        (ARM64 / "complete").touch()
    shutil.rmtree(own, ignore_errors=True)
    quiet_install(own, [str(the_wheel(dist, "aarch64"))])
    environment = {"PYTHONPATH": f"{own}:{packages}", "PATH": "/nowhere", "HF_HUB_OFFLINE": "1", "HOME": str(ARM64)}
    said = run([emulator, "-L", str(system), str(system / "usr" / "bin" / "python3"), "-c", TRIAL], environment)
    say(f"aarch64 under {Path(emulator).name}, {TORCH['aarch64']}: {said.strip()}")


def unpack_debian(target: Path) -> None:
    """Unpack Debian's arm64 Python into a folder; this system's own packages and lists are left alone."""
    state, cache = ARM64 / "state", ARM64 / "cache"
    for folder in (state / "lists" / "partial", cache / "archives" / "partial", target):
        folder.mkdir(parents=True)
    (state / "status").touch()
    options = {
        "Dir::State": state, "Dir::State::status": state / "status", "Dir::Cache": cache, "APT::Architecture": "arm64",
        "APT::Architectures": "arm64", "Debug::NoLocking": 1, "APT::Sandbox::User": "root",
    }  # fmt: skip
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    run([*apt, "update"])
    run([*apt, "install", "-y", "--download-only", "--no-install-recommends", *DEBIAN])
    for archive in sorted((cache / "archives").glob("*.deb")):
        run(["dpkg", "-x", str(archive), str(target)])


def quiet_install(target: Path, what: list[str]) -> None:
    """Install wheels for aarch64 into a folder, without looking for what they need."""
    platforms = [f"--platform={name}_aarch64" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    python = next(iter((ARM64 / "system" / "usr" / "lib").glob("python3.*"))).name.removeprefix("python")
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    run([*command, f"--target={target}", *platforms, f"--python-version={python}", "--only-binary=:all:", *what])


def closure(name: str) -> list[str]:
    """Return what a package of this environment needs, itself included, with its version; torch apart."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in found or name == "torch":
            continue
        distribution = importlib.metadata.distribution(name)
        found[name] = distribution.version
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return [f"{name}=={version}" for name, version in found.items()]


CHECKS = {"x86_64": check_here, "aarch64": check_aarch64}


def main() -> None:
    """Check the wheels that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machines", nargs="*", metavar="MACHINE", help=f"{' or '.join(CHECKS)}; default: all")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where the wheels are")
    options = parser.parse_args()
    unknown = set(options.machines) - set(CHECKS)
    if unknown:
        parser.error(f"MACHINE must be one of {', '.join(CHECKS)}, got {', '.join(sorted(unknown))}")
    for machine in options.machines or CHECKS:
        CHECKS[machine](options.dist.resolve())


if __name__ == "__main__":
    main()
