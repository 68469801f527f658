"""Let the tests of the programs in tools/ import their parts, which are no packages of the project."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]
