"""The build scripts of this checkout, as modules."""

import importlib.util
import sys
from pathlib import Path

__all__ = ["ROOT", "build", "native_build"]

ROOT = Path(__file__).resolve().parents[1]


def load_setup():
    spec = importlib.util.spec_from_file_location("dk_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load_setup()
native_build = sys.modules[build.build_library.__module__]
