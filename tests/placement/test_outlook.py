from dataclasses import replace

import pytest

from hetero_glm5.placement.outlook import HIGH, LOW, UNPACKING, Ends, Machine, Work, decode, prefill

GPU = Machine(ram=400e9, flops=4e12, link=25e9, disk=5e9, gpu=(1e12, 100e12))
CPU = replace(GPU, gpu=None)
EXACT = Ends(1, 1, 1, 1, 1e-3, 1e-3)
WORK = Work(
    dense=40_000_000_000, itemsize=2, layers=78, moe_layers=75, experts=256, top_k=8, expert=20_000_000, method="INT4",
    bits=4.0, share=0.0, in_memory=1.0, divides=False,
)  # fmt: skip


def test_decode_by_hand():
    call = 50e-6  # of the host
    experts = 75 * (8 * 20e6 / 400e9 + call)
    assert decode(GPU, WORK, EXACT).seconds == pytest.approx(40e9 / 1e12 + 0.078 + experts)
    assert decode(CPU, WORK, EXACT).seconds == pytest.approx(40e9 / 400e9 + 0.078 + experts)
    half = replace(WORK, share=0.5)
    unpacked = 20e6 * UNPACKING["INT4"] * 2 / 1e12
    sides = 4 * 20e6 / 400e9 + call, 4 * unpacked + 20e-6
    assert decode(GPU, half, EXACT).seconds == pytest.approx(40e9 / 1e12 + 0.078 + 75 * max(sides))
    slower = 4 * 20e6 * UNPACKING["INT4"] * 2 / 400e9 + 20e-6
    assert decode(CPU, half, EXACT).seconds == pytest.approx(0.1 + 0.078 + 75 * (sides[0] + slower))


def test_experts_in_files_are_read_at_the_disk_s_speed():
    slow = decode(CPU, replace(WORK, in_memory=0.5), EXACT).seconds - decode(CPU, WORK, EXACT).seconds
    assert slow == pytest.approx(75 * 8 * 20e6 * 0.5 * (1 / 5e9 - 1 / 400e9))


def test_prefill_by_hand():
    weights, tokens = 20e9, 2048
    flops = 2 * 2 * 20e6 * 64  # of an expert: 4 bits a weight
    experts = 75 * (256 * flops / 4e12 + 50e-6)
    assert prefill(GPU, WORK, EXACT, tokens).seconds == pytest.approx(2 * weights * tokens / 100e12 + 0.078 + experts)
    divided = prefill(replace(GPU, flops=1e11), replace(WORK, divides=True), EXACT, tokens)
    assert divided.seconds < prefill(replace(GPU, flops=1e11), WORK, EXACT, tokens).seconds
    assert "streamed" in divided.formula


def test_the_low_end_is_lower():
    for machine in (GPU, CPU):
        assert decode(machine, WORK, LOW).seconds > 1.2 * decode(machine, WORK, HIGH).seconds
        assert prefill(machine, WORK, LOW, 512).seconds > 1.2 * prefill(machine, WORK, HIGH, 512).seconds
