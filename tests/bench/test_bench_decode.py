from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny import tiny_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "bench_decode.py"


def test_parts_bytes_and_shares(checkpoints):
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16")
    command = [sys.executable, str(SCRIPT), "--model", str(folder), "--device", "cpu", "--json", "--roof-mb", "16"]
    options = ["--batch", "2", "--prompt", "40", "--steps", "3", "--kt-num-gpu-experts", "8"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert set(rows) == {
        *("attention", "host_experts", "device_experts", "shared_expert", "dense_mlp", "lm_head", "sampling"),
        *("python", "step"),
    }
    assert rows["lm_head"]["bytes"] == 512 * 256 * 2
    assert rows["shared_expert"]["bytes"] == 3 * 3 * 256 * 128 * 2 + 3 * (16 * 256 + 16) * 4  # with the router
    experts = rows["host_experts"]["bytes"] + rows["device_experts"]["bytes"]
    assert 3 * 4 * 3 * 256 * 128 * 2 <= experts <= 3 * 8 * 3 * 256 * 128 * 2 * 1.1  # 4 to 8 distinct experts a layer
    parts = sum(row["median_ms"] for name, row in rows.items() if name != "step")
    assert 0.1 < parts / rows["step"]["median_ms"] < 10  # steps that are timed apart, and perhaps beside other work


def test_a_wrong_flag_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), "--model", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("bench_decode: ") and "Traceback" not in done.stderr
