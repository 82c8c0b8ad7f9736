"""What a machine that is known by its bandwidths only would make of a model: each figure twice, as the ends of a range.

The low end takes what plain torch and a busy machine leave of a data sheet's rates, the high end what this project's
kernels reach on a quiet one. Decode of one sequence, and prefill of a chunk of T tokens, by layer:

    decode   D / V + L·c + M·side(k·(1-g) experts of one token on the host, k·g on the device)
    prefill  max(D / V, 2·D'·T / F) + L·c + M·(placement/divide.py of T·k/E tokens for each expert)

D, D': bytes and weights outside the routed experts; V, F: bytes/s and FLOP/s of where they are; L, M: layers and MoE
layers; c: calls of a layer; g: the share of experts on the device. Both sides work at once (the later one counts), but
for a machine without a GPU, which does one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hetero_glm5.placement.cost import Costs, Curve
from hetero_glm5.placement.divide import divide, undivided

# Bytes of device memory that plain torch moves for each weight to unpack it, which it does at every use.
UNPACKING = {"FP32": 20, "BF16": 12, "FP8": 24, "INT8": 40, "INT4": 48}


class Ends(NamedTuple):
    """What a range assumes of the data sheet's rates: `host` and `device` of the bandwidth, `host_flops` and
    `device_flops` of the peak, and the seconds of a layer's calls on either."""

    host: float
    device: float
    host_flops: float
    device_flops: float
    host_layer: float
    device_layer: float


LOW = Ends(0.6, 0.4, 0.3, 0.15, 200e-6, 800e-6)
HIGH = Ends(0.92, 0.85, 1.0, 0.6, 40e-6, 250e-6)


@dataclass(frozen=True)
class Machine:
    """Rates as data sheets have them, in bytes/s and FLOP/s; gpu: memory and peak, None without one."""

    ram: float
    flops: float
    link: float
    disk: float
    gpu: tuple[float, float] | None


@dataclass(frozen=True)
class Work:
    """A model's part: dense bytes read for a token; layers, MoE layers; experts E, top_k of them; an expert's bytes,
    method and bits of a weight; shares on the device, and of the host's in memory (the others are in files)."""

    dense: int
    itemsize: int
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    expert: int
    method: str
    bits: float
    share: float
    in_memory: float
    divides: bool


@dataclass(frozen=True)
class Figure:
    """Seconds of a step, and the sum that they are."""

    seconds: float
    formula: str


def decode(machine: Machine, work: Work, ends: Ends) -> Figure:
    """One token of one sequence."""
    costs, bandwidth, _, call = _side(machine, work, ends)
    misses, hits = work.top_k * (1 - work.share), work.top_k * work.share
    one = np.ones(1)
    host = misses * float(costs.on_host(one)[0]) + costs.host_call if misses else 0.0
    device = hits * float(costs.on_device(one)[0]) + costs.device_call if hits else 0.0
    side = max(host, device) if machine.gpu else host + device
    dense, calls = work.dense / bandwidth, work.layers * call
    read = 1 / float(costs.host(one)[0])
    host_words = f"{misses:.1f} experts x {work.expert / 2**20:.1f} MiB / {read / 1e9:.0f} GB/s"
    words = [host_words] if misses else []
    if hits:
        words.append(f"{hits:.1f} on the device x {1e3 * float(costs.on_device(one)[0]):.2f} ms")
    both = (" and " if machine.gpu else " + ").join(words)
    formula = (
        f"dense {work.dense / 1e9:.2f} GB / {bandwidth / 1e9:.0f} GB/s + {work.layers} layers x {1e3 * call:.2f} ms + "
        f"{work.moe_layers} MoE layers x ({both} = {1e3 * side:.2f} ms) = "
        f"{1e3 * dense:.1f} + {1e3 * calls:.1f} + {1e3 * work.moe_layers * side:.1f} ms"
    )
    return Figure(dense + calls + work.moe_layers * side, formula)


def prefill(machine: Machine, work: Work, ends: Ends, tokens: int) -> Figure:
    """A chunk of so many tokens, at the beginning of a prompt; routing spreads them evenly."""
    costs, bandwidth, flops, call = _side(machine, work, ends)
    each = np.full(work.experts, max(1, round(tokens * work.top_k / work.experts)))
    slot_of = np.full(work.experts, -1)
    slot_of[: round(work.share * work.experts)] = 0
    found = divide(each, slot_of, costs) if work.divides else undivided(each, slot_of, costs)
    side = found.seconds if machine.gpu else found.host_seconds + found.device_seconds
    dense = max(work.dense / bandwidth, 2 * work.dense / work.itemsize * tokens / flops)
    calls = work.layers * call
    streamed = f", {len(found.streamed)} of them streamed" if len(found.streamed) else ""
    formula = (
        f"{tokens} tokens: dense 2 x {work.dense / work.itemsize / 1e9:.2f} G x {tokens} / {flops / 1e12:.1f} TFLOP/s "
        f"+ {work.layers} layers x {1e3 * call:.2f} ms + {work.moe_layers} MoE layers x ({work.experts} experts of "
        f"{each[0]} tokens{streamed} = {1e3 * side:.1f} ms) = "
        f"{dense:.2f} + {calls:.2f} + {work.moe_layers * side:.2f} s"
    )
    return Figure(dense + calls + work.moe_layers * side, formula)


def _side(machine: Machine, work: Work, ends: Ends) -> tuple[Costs, float, float, float]:
    """Of experts on both sides, then bytes/s, FLOP/s and seconds of a layer's calls where all else is computed."""
    ram, flops = machine.ram * ends.host, machine.flops * ends.host_flops
    host = 1 / (work.in_memory / ram + (1 - work.in_memory) / machine.disk)
    here = (ram, flops, ends.host_layer)
    if machine.gpu is not None:
        here = (machine.gpu[0] * ends.device, machine.gpu[1] * ends.device_flops, ends.device_layer)
    unpacked = here[0] / (UNPACKING[work.method] / (work.bits / 8))
    curves = Curve.roofline(host, flops, work.bits), Curve.roofline(unpacked, here[1], work.bits)
    return Costs(work.expert, *curves, link=machine.link * ends.host), *here
