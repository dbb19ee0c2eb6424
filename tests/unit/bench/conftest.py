"""The benchmark's modules lie in `bench/`, and import each other by their bare names."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).parents[3] / "bench"

sys.path.append(str(BENCH))
