"""Make a virtual environment with the package in it, using nothing but a Python 3 and pip's own defaults.

    python3 tools/environment.py --venv .venv --torch torch==2.13.0 --extras demo,test [--pin transformers==4.57.6 ...]
    python3 tools/environment.py --venv .venv-docs --alone --pin mkdocs==1.6.1 ...      # neither torch nor the package

Does nothing when the environment already holds what is asked for. torch is installed first and on its own, so that the
version given here is the one that stays. Run by the Makefile; it must parse under any Python 3, to be able to say that
an old one is too old.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 10)
OLDEST_TORCH = (2, 9)
NO_VENV = """\
This Python ({python}) cannot make virtual environments: it has neither ensurepip, nor pip, nor virtualenv.
On Debian or Ubuntu, install what is missing and run the same command again:

    apt install python3-venv
"""
PYTHON_VERSION = "import sys; print(sys.version)"
TORCH_VERSION = "import importlib.metadata as m; print(m.version('torch'))"


def say(text):
    """Write one line of progress."""
    print("[environment] " + text, file=sys.stderr, flush=True)


def works(command):
    """Return whether a command succeeds, quietly."""
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return False
    return done.returncode == 0


def install_venv_package():
    """Install Debian's python3-venv on a throw-away machine: root, apt-get, and CI set. Return whether it was tried."""
    if os.geteuid() != 0 or not os.environ.get("CI") or shutil.which("apt-get") is None:
        return False
    say("apt-get install python3-venv (running as root with CI set)")
    works(["apt-get", "update", "-q"])
    return works(["apt-get", "install", "-y", "-q", "--no-install-recommends", "python3-venv"])


def create(venv):
    """Create the virtual environment, by the first way that this Python offers."""
    inside = str(venv / "bin" / "python")
    borrowed = ROOT / "build" / "bootstrap"
    python = sys.executable

    def venv_with_pip():
        return works([python, "-m", "venv", str(venv)])

    def venv_with_pip_from_outside():
        # Debian without python3-venv has the venv module but not ensurepip.
        made = works([python, "-m", "venv", "--without-pip", str(venv)])
        return made and works([python, "-m", "pip", "--python", inside, "install", "-q", "pip"])

    def virtualenv():
        return works([python, "-m", "virtualenv", "-q", str(venv)])

    def virtualenv_from_pip():
        # --target touches neither the system's nor the user's packages.
        if not works([python, "-m", "pip", "install", "-q", "--target", str(borrowed), "virtualenv"]):
            return False
        start = (
            f"import sys; sys.path.insert(0, {str(borrowed)!r}); import virtualenv; virtualenv.cli_run([{str(venv)!r}])"
        )
        return works([python, "-c", start])

    def venv_after_apt():
        return install_venv_package() and venv_with_pip()

    for way in (venv_with_pip, virtualenv, venv_with_pip_from_outside, virtualenv_from_pip, venv_after_apt):
        shutil.rmtree(str(venv), ignore_errors=True)
        if way() and works([inside, "-m", "pip", "--version"]):
            say(f"created {venv} ({way.__name__.replace('_', ' ')})")
            return
    shutil.rmtree(str(venv), ignore_errors=True)
    sys.exit(NO_VENV.format(python=python))


def answer(inside, question):
    """Return what a line of Python prints in the environment, or None when it fails."""
    try:
        done = subprocess.run([inside, "-c", question], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def torch_version(inside):
    """Return the version of torch in the environment as (major, minor), or None."""
    version = answer(inside, TORCH_VERSION)
    return version and tuple(map(int, version.split(".")[:2]))


def pip_install(inside, *arguments):
    """Run pip install in the environment; leave with its status when it fails."""
    say("pip install " + " ".join(arguments))
    command = [inside, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    # Somebody who watches sees the progress of a download that may be large; a log gets errors only.
    quiet = [] if sys.stderr.isatty() else ["-qq"]
    environment = dict(os.environ, PYTHONWARNINGS="ignore")
    done = subprocess.run([*command, *quiet, *arguments], cwd=str(ROOT), stdin=subprocess.DEVNULL, env=environment)
    if done.returncode:
        sys.exit("[environment] pip failed; the messages above say why")


def wanted_state(options):
    """Return what identifies a finished environment: every input of the install."""
    state = hashlib.sha256()
    for name in ("pyproject.toml", "tools/environment.py"):
        state.update((ROOT / name).read_bytes())
    state.update(
        json.dumps(
            [sys.version, str(ROOT), sorted(options.extras.split(",")), sorted(options.pin), options.alone]
        ).encode()
    )
    return state.hexdigest()


def main():
    """Create or complete the environment named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", required=True, type=Path)
    parser.add_argument("--torch", default="torch", help="what to give to pip when no recent torch is there")
    parser.add_argument("--extras", default="", help="comma-separated extras of the package")
    parser.add_argument("--alone", action="store_true", help="install what --pin names, without torch and the package")
    parser.add_argument("--pin", action="append", default=[], help="one more requirement, as transformers==4.57.6")
    options = parser.parse_args()
    if sys.version_info < OLDEST:
        found = sys.version.split()[0]
        sys.exit(
            f"Python {OLDEST[0]}.{OLDEST[1]} or later is needed, this is {found}; try `make PYTHON=python3.12 ...`"
        )
    venv = (ROOT / options.venv).resolve()
    inside = str(venv / "bin" / "python")
    # One stamp per set of extras: `make demo` and `make test` share an environment.
    name = "alone" if options.alone else "-".join(sorted(options.extras.split(","))) or "bare"
    stamp = venv / ("installed-" + name)
    needed = "import pip" if options.alone else "import torch"
    if stamp.is_file() and stamp.read_text() == wanted_state(options) and works([inside, "-c", needed]):
        return
    same_python = answer(inside, PYTHON_VERSION) == answer(sys.executable, PYTHON_VERSION)
    if not same_python or not works([inside, "-m", "pip", "--version"]):
        create(venv)
    if options.alone:
        pip_install(inside, *options.pin)
    else:
        install_package(inside, options)
    stamp.write_text(wanted_state(options))
    say("ready: " + str(venv))


def install_package(inside, options):
    """Install torch, unless a recent one is there, and the package with its extras."""
    found = torch_version(inside)
    if found is None or found < OLDEST_TORCH:
        pip_install(inside, options.torch)
    pip_install(inside, "setuptools>=77")
    package = f".[{options.extras}]" if options.extras else "."
    pip_install(inside, "--no-build-isolation", "-e", package, *options.pin)


if __name__ == "__main__":
    main()
