"""How many tile products a call takes, counted by the emulator of this process; test_kernels.py runs this file."""

import ctypes

import pytest
import torch

from hetero_glm5.experts.cpu_tier import CpuExperts
from hetero_glm5.weights.quantize import METHODS, PackedExperts, pack_experts

DOTS = ("tdpbf16ps", "tdpbsud")
OTHERS = ("tdpbssd", "tdpbusd", "tdpbuud")
count = ctypes.CDLL(None).amx_emulator_count
count.restype = ctypes.c_uint64


def counts(*names: str) -> list[int]:
    return [count(name.encode()) for name in names]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def chunks(packed: PackedExperts, columns: int, parts: int) -> int:
    """A operands that a row of so many columns is cut into, 64 bytes each or a group's."""
    group = packed.layout.group
    return parts * ceil_div(columns, group) * max(1, group // 64) if group else ceil_div(columns, 32)


def products(packed: PackedExperts, rows: int) -> tuple[int, int]:
    """(tile products, weight tiles) of one expert's call: 16 tokens x 16 outputs each."""
    hidden, intermediate = packed.layout.hidden, packed.layout.intermediate
    gate_up, down = 2 * ceil_div(intermediate, 32), ceil_div(hidden, 32)
    parts = 2 if packed.layout.method == "INT8" else 1
    halves = gate_up * chunks(packed, hidden, 1) + down * chunks(packed, intermediate, parts)
    return 2 * halves * ceil_div(rows, 16), gate_up + down


@pytest.mark.parametrize("rows", [1, 4, 5, 17, 33, 48])
@pytest.mark.parametrize(("method", "group"), [*((method, 0) for method in METHODS), ("INT4", 128), ("INT8", 32)])
def test_products(method, group, rows):
    hidden, intermediate = 1100, 70
    parts = [torch.randn(1, *shape) for shape in [(intermediate, hidden)] * 2 + [(hidden, intermediate)]]
    packed = pack_experts(*parts, method=method, group=group)
    experts = CpuExperts(packed, threads=2, isa="amx")
    before = counts(*DOTS, "tilerelease", *OTHERS)
    experts(torch.randn(rows, hidden), torch.zeros(rows, 1, dtype=torch.int32), torch.ones(rows, 1))
    took = [after - b for after, b in zip(counts(*DOTS, "tilerelease", *OTHERS), before, strict=True)]

    expected, tiles = products(packed, rows)
    integer = method.startswith("INT")
    if method == "FP32" or (integer and rows < 5):
        expected = tiles = 0
    assert took == [0 if integer else expected, expected if integer else 0, tiles, 0, 0, 0]
