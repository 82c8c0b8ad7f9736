from __future__ import annotations

import pytest
from roofline import MoeRow, Probe, Roof, Sample, instruction_of, plot

from hetero_glm5 import _C
from hetero_glm5.weights.quantize import METHODS

BEFORE, AFTER = Roof(bandwidth=8e9, peak=90e9), Roof(bandwidth=12e9, peak=110e9)  # 10e9 and 100e9 on average


def row(*samples: Sample) -> MoeRow:
    return MoeRow("BF16", "x", 4, "fma512", samples, error=0.004)


def test_bound_by_bandwidth():
    few = row(Sample(0.2, nbytes=10**9, ops=4 * 10**9, before=BEFORE, after=AFTER))
    assert few.of_bandwidth == pytest.approx(0.5) == few.of_roofline
    assert few.as_dict()["gb_per_s"] == pytest.approx(5) and few.as_dict()["gflop_per_s"] == pytest.approx(20)


def test_bound_by_arithmetic():
    many = row(Sample(0.2, nbytes=10**9, ops=16 * 10**9, before=BEFORE, after=AFTER))
    assert many.of_bandwidth == pytest.approx(0.5)
    assert many.of_roofline == pytest.approx(0.8)


def test_a_share_is_taken_call_by_call():
    slow = Sample(0.4, 10**9, 10**9, Roof(5e9, 1e12), Roof(5e9, 1e12))
    fast = Sample(0.2, 10**9, 10**9, Roof(10e9, 1e12), Roof(10e9, 1e12))
    assert row(slow, fast, slow).of_roofline == pytest.approx(0.5)


def test_every_format_has_an_instruction_on_every_isa():
    for isa in _C.isas():
        for method in METHODS:
            assert instruction_of(method, isa) in _C.probe.instructions()
    assert instruction_of("BF16", "avx512_bf16") == "vdpbf16ps"
    assert instruction_of("INT4", "avx512_bf16") == "vpdpbusd"
    assert instruction_of("FP8", "amx") == "tdpbf16ps" and instruction_of("INT8", "amx") == "tdpbsud"
    assert instruction_of("FP32", "amx") == "fma512"
    assert instruction_of("FP32", "avx512_bf16") == instruction_of("FP8", "avx512") == "fma512"
    assert instruction_of("BF16", "avx2") == "fma256"


def test_probe_is_positive():
    roof = Probe(threads=1, nbytes=1 << 22)("mulps")
    assert roof.bandwidth > 0 and roof.peak > 0


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(Sample(0.2, 10**9, ops, BEFORE, AFTER)) for ops in (10**9, 10**10)]
    plot(rows, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
