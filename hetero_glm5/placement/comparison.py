"""Planners side by side: each by its name, started alike, on one trace and one machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetero_glm5.placement.baselines import LFU, LRU, Belady, KTDynamic, most_hits
from hetero_glm5.placement.cost import Costs, Curve
from hetero_glm5.placement.planner import Adaptive, Planner, Static
from hetero_glm5.placement.policy import place, slots
from hetero_glm5.placement.simulate import Replay, replay
from hetero_glm5.placement.trace import Steps

STATIC = ("uniform", "front-loading", "random", "frequency")  # frequency: of the very trace, which nobody knows before
PLANNERS = (*STATIC, "kt-dynamic", "LRU", "LFU", "Belady", "adaptive")
KT_THRESHOLD = 256  # tokens of a prefill
BITS = 4.378  # of a weight: INT4 in groups of 32 columns, scales and outlier corrections included
LAYER = 150e-6  # seconds of attention, router and shared expert


def roofline(expert: int, *, link: float, host: float, device: float, bits: float = BITS) -> Costs:
    """A machine from its bandwidths in bytes/s; 3 TFLOP/s on the host and 150 on the device. expert in bytes."""
    sides = Curve.roofline(host, 3e12, bits), Curve.roofline(device, 150e12, bits)
    return Costs(expert, *sides, link=link, layer=LAYER)


GLM5_EXPERT = int(20.6 * (1 << 20))  # bytes
MACHINES = {
    "rtx5090": roofline(GLM5_EXPERT, link=50e9, host=400e9, device=1.5e12),  # and 12 channels of DDR5
    "rtx4090": roofline(GLM5_EXPERT, link=25e9, host=150e9, device=0.9e12),  # and 4 channels
}


@dataclass(frozen=True)
class Case:
    """A trace on a machine. `warm_up` steps are not counted."""

    steps: Steps
    costs: Costs
    top_k: int
    warm_up: int = 0

    def run(self, name: str, share: float) -> Replay:
        """One of PLANNERS with `share` of all experts in slots. Raises ValueError when the trace is too short."""
        return replay(self.steps, self.planner(name, share), self.costs, self.warm_up)

    def planner(self, name: str, share: float) -> Planner:
        start = name if name in STATIC else "uniform"
        _, layers, experts = self.steps.decode.shape
        counts = self.steps.decode.sum(axis=0, dtype=np.float64)
        slot_of = slots(place(start, layers, experts, self.budget(share), counts))
        if name in STATIC:
            return Static(slot_of)
        if name == "kt-dynamic":
            return KTDynamic(slot_of, KT_THRESHOLD, self.top_k)
        if name == "Belady":
            return Belady(slot_of, self.steps)
        return Adaptive(slot_of, self.costs) if name == "adaptive" else {"LRU": LRU, "LFU": LFU}[name](slot_of)

    def budget(self, share: float) -> int:
        _, layers, experts = self.steps.decode.shape
        return round(share * layers * experts)

    def most_hits(self, share: float, like: Replay) -> float:
        """Belady's bound for as many fetches as `like` has copies."""
        return most_hits(self.steps, self.budget(share), round(like.copies * like.steps), self.warm_up)
