"""The soak's modules lie beside `bench/soak.py`, and import each other by their bare names."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"

sys.path.append(str(BENCH))
