from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CPUS = len(os.sched_getaffinity(0))
SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "bench_pool.py"


def test_rows():
    command = [sys.executable, str(SCRIPT), "--calls", "20", "--threads", "1,3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    fork_joins = {(r["threads"], r["body_us"], r["gap_us"]) for r in rows if r["name"] == "fork_join"}
    assert fork_joins == {(n, body, gap) for n in (1, 3) for body in (0, 20) for gap in (0, 20, 200, 2000)}
    there, back = ([r for r in rows if r["name"] == name] for name in ("hand_over", "there_and_back"))
    assert len(there) == len(back) == 4
    assert all(a["over_us"] <= b["over_us"] for a, b in zip(there, back, strict=True))
    assert [row["threads"] / CPUS for row in rows if row["name"] == "crowded"] == [1, 2, 4, 8]
    assert all(row["over_us"] <= row["p99_us"] and row["calls"] == 20 for row in rows)
    assert all(row["over_us"] > 0 if row["body_us"] == 0 else row["slower"] > 0.99 for row in rows)
