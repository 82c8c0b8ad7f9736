from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hetero_glm5 import _C

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "bench_roofs.py"


def test_every_roof_is_positive():
    command = [sys.executable, str(SCRIPT), "--mb", "8", "--passes", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in rows] == ["read", *_C.probe.instructions()]
    assert all(0 < row["median"] <= row["best"] and row["threads"] >= 1 for row in rows)
