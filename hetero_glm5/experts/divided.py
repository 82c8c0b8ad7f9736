"""A long prefill's layer over both tiers: experts in slots where they are, of the others some on the host, and some
copied to the device for this layer only (placement/divide.py decides which).

Two staging slots: while the device computes with one, the other is filled. What a layer leaves idle at its end is used
to fetch the experts with which the next layer began in the previous chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hetero_glm5.experts.copies import Copies, Mark
from hetero_glm5.experts.gpu_tier import GpuExperts
from hetero_glm5.experts.mover import copy_expert
from hetero_glm5.placement.cost import Costs
from hetero_glm5.placement.divide import divide
from hetero_glm5.weights.quantize import PackedExperts

STAGES = 2


@dataclass
class Staged:
    """An expert in a staging slot, from `mark` on."""

    expert: int
    slot: int
    mark: Mark


class DividedPrefill:
    """`experts[i]` holds every expert of MoE layer i on the host. threshold: rows of a step from which its layers are
    divided."""

    def __init__(
        self, threshold: int, experts: Sequence[PackedExperts], tier: GpuExperts, copies: Copies, costs: Costs
    ):
        self.threshold, self.experts, self.tier, self.copies, self.costs = threshold, experts, tier, copies, costs
        self.staging = torch.empty((STAGES, tier.layout.blob_bytes), dtype=torch.uint8, device=tier.slots.device)
        self._next = 0  # the layer that what follows is for
        self._staged: deque[Staged] = deque()
        self._todo: deque[int] = deque()  # experts to copy
        self._free = list(range(STAGES))  # slots
        self.streamed_bytes = 0
        self._began: dict[int, list[int]] = {}  # by layer: with which experts, in the latest chunk

    def begin(self, layer: int, ids: np.ndarray, slot_of: np.ndarray) -> np.ndarray:
        """Divides a layer and asks for the first copies. ids [T, k] of its rows, on the host; slot_of [E], -1 = host.
        Returns bool [E]: the experts that the host is to compute."""
        tokens = np.bincount(ids.reshape(-1), minlength=len(slot_of))
        useful = [s for s in self._staged if layer == self._next and tokens[s.expert] and slot_of[s.expert] < 0]
        here = slot_of.copy()
        here[[staged.expert for staged in useful]] = 0
        streamed = divide(tokens, here, self.costs).streamed
        self._next, self._staged, self._todo = layer, deque(useful), deque(streamed.tolist())
        self._free = sorted(set(range(STAGES)) - {staged.slot for staged in useful})
        self._fill()
        self._began[layer] = [staged.expert for staged in self._staged]
        on_host = (here < 0) & (tokens > 0)
        on_host[streamed] = False
        return on_host

    @property
    def begun(self) -> bool:
        """Whether there are copied experts to compute."""
        return bool(self._staged)

    def compute(self, layer: int, x: Tensor, ids: np.ndarray, weights: Tensor) -> Tensor:
        """After begin(): the part of the sum that the copied experts have, fp32 [T, hidden]; weights fp32 [T, k] on the
        device."""
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        flat = ids.reshape(-1)
        places = torch.from_numpy(np.argsort(flat, kind="stable")).to(x.device)
        ends = np.cumsum(np.bincount(flat, minlength=self.experts[layer].num_experts))
        while self._staged:
            staged = self._staged.popleft()
            staged.mark.hold()
            mine = places[ends[staged.expert - 1] if staged.expert else 0 : ends[staged.expert]]
            self.tier.add(y, x, weights, mine, self.staging[staged.slot])
            self._free.append(staged.slot)
            self._fill()
        self._next = (layer + 1) % len(self.experts)
        self._todo = deque(self._began.get(self._next, []))
        self._fill()
        return y

    def _fill(self) -> None:
        """Copies to the slots that are free, once what the device was asked to compute from them is done."""
        while self._free and self._todo:
            expert, slot = self._todo.popleft(), self._free.pop(0)
            self.copies.after_compute()
            self.streamed_bytes += copy_expert(self.experts[self._next], expert, self.staging[slot], self.copies)
            self._staged.append(Staged(expert, slot, self.copies.mark()))
