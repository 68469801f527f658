"""Let the pytest-benchmark file import its neighbours, which run as plain scripts otherwise."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
