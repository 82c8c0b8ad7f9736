from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_moe import PeerError, PeerProcess, against, packed_experts
from moe_case import MoeCase
from roofline import MoeRow, Roof, Sample

from hetero_glm5 import _C
from hetero_glm5.weights.quantize import METHODS, ExpertLayout

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "bench_moe.py"
SHAPE = ("--hidden", "256", "--intermediate", "128", "--experts", "12", "--topk", "3", "--threads", "2")
# ||y - exact|| / ||exact|| on Gaussian weights; a format without a line must at least be recognisable
BOUND = {"FP32": 1e-4, "BF16": 0.01, "FP8": 0.06, "INT8": 0.03, "INT4": 0.2}


def run(*options):
    command = [sys.executable, str(SCRIPT), *SHAPE, "--calls", "2", "--roof-mb", "8", *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_figures_are_consistent():
    done = run("--json", "--tokens", "1,40", "--isa", "all", "--peers", "torch")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    ours = [row for row in rows if row["layer"] != "torch"]
    assert {(r["method"], r["layer"], r["tokens"]) for r in ours} == {
        (method, isa, tokens) for method in METHODS for isa in _C.isas() for tokens in (1, 40)
    }
    assert {row["method"] for row in rows if row["layer"] == "torch"} == {"FP32", "BF16"}
    for row in rows:
        blob = ExpertLayout(row["method"], 256, 128).blob_bytes
        assert row["bytes"] == (3 if row["tokens"] == 1 else 12) * blob
        assert row["ops"] == 2 * 3 * 256 * 128 * 3 * row["tokens"]
        assert row["error"] < BOUND.get(row["method"], 0.5)
        assert row["calls"] == 2 and row["instruction"] in _C.probe.instructions()
        for positive in ("ms", "gb_per_s", "gflop_per_s", "of_bandwidth", "bandwidth_gb_per_s", "peak_gop_per_s"):
            assert row[positive] > 0
        assert row["of_roofline"] > 0.999 * row["of_bandwidth"]
        assert row["layer"] == "torch" or 0 < row["outlier_error"] < BOUND[row["method"]]
        has_peer = row["method"] in ("FP32", "BF16") and row["layer"] != "torch"
        assert (row["of_best_peer"] is not None) == has_peer


def test_a_peer_that_is_not_there_is_one_line(tmp_path):
    done = run("--methods", "BF16", "--tokens", "2", "--peers", "kt-kernel", "--peer-python", str(tmp_path / "python"))
    assert done.returncode == 0
    assert done.stderr.startswith("bench_moe: kt-kernel BF16 is left out: ") and len(done.stderr.splitlines()) == 1
    assert _C.isas()[0] in done.stdout


def test_a_peer_process_answers_and_says_why_it_ended():
    process = PeerProcess("torch", MoeCase(64, 32, experts=4, topk=2), "BF16", 1, Path(sys.executable))
    assert process.error(2) < 0.01
    assert process.seconds(2, draw=1) > 0
    process._process.kill()
    with pytest.raises(PeerError, match="ended with status -9"):
        process.seconds(2, draw=1)
    process.close()


def test_a_peer_that_cannot_load_is_refused():
    with pytest.raises(PeerError, match="FP8"):
        PeerProcess("torch", MoeCase(64, 32, experts=4, topk=2), "FP8", 1, Path(sys.executable))


@pytest.mark.parametrize("option", ["--methods", "--peers", "--isa"])
def test_unknown_names_are_refused(option):
    done = run(option, "nonsense")
    assert done.returncode == 2 and "'nonsense' is not one of " in done.stderr


def test_repeated_experts_have_memory_of_their_own():
    packed = packed_experts(MoeCase(64, 32, experts=9, topk=2), "BF16")
    first, second, last = packed.blob(0), packed.blob(4), packed.blob(8)
    assert len({t.data_ptr() for t in (first, second, last)}) == 3
    assert first.equal(second) and first.equal(last) and not first.equal(packed.blob(1))


def moe_row(layer: str, instruction: str, seconds: float, bandwidth: float) -> MoeRow:
    roof = Roof(bandwidth, 1e12)
    return MoeRow("BF16", layer, 1, instruction, (Sample(seconds, 10**9, 1, roof, roof),), 0.0)


def test_the_best_peer_is_the_one_nearest_to_its_roof():
    peers = [moe_row("a", "fma512", 0.2, 10e9), moe_row("b", "fma512", 0.25, 5e9)]  # 50 % and 80 %
    assert against(moe_row("x", "fma512", 0.1, 10e9), peers).ratio == pytest.approx(1 / 0.8)
    assert against(moe_row("x", "fma256", 0.1, 10e9), peers).ratio == pytest.approx(2)  # another roof: by time
    assert against(moe_row("x", "fma512", 0.1, 10e9), []).ratio is None
