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
from hetero_glm5.ops import reference as ops
from hetero_glm5.placement.cost import Costs
from hetero_glm5.placement.divide import Division, divide
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
        self._staged: deque[Staged] = deque()  # for layer _next, before it is asked for
        self._next = 0
        self._streamed: dict[int, list[int]] = {}  # by layer, in its latest division

    def divide(self, layer: int, ids: np.ndarray, slot_of: np.ndarray) -> Division:
        """ids [T, k] on the host; slot_of [E] of the layer, -1 = host."""
        tokens = np.bincount(ids.reshape(-1), minlength=len(slot_of))
        ahead = [s.expert for s in self._staged] if layer == self._next else []
        return divide(tokens, slot_of >= 0, self.costs, ahead)

    def streamed(self, layer: int, division: Division, x: Tensor, ids: np.ndarray, weights: Tensor) -> Tensor:
        """The streamed experts' part of the sum, fp32 [T, hidden]; weights fp32 [T, k] on the device."""
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        flat = ids.reshape(-1)
        order = np.argsort(flat, kind="stable")
        ends = np.cumsum(np.bincount(flat, minlength=self.experts[layer].num_experts))
        places = torch.from_numpy(order).to(x.device)
        todo, ready = deque(division.streamed), self._take(layer, division.streamed)
        free = [s for s in range(STAGES) if s not in {staged.slot for staged in ready}]
        for staged in ready:
            todo.remove(staged.expert)
        while ready or todo:
            while free and todo:
                ready.append(self._stage(layer, todo.popleft(), free.pop(0)))
            staged = ready.popleft()
            staged.mark.hold()
            mine = places[ends[staged.expert - 1] if staged.expert else 0 : ends[staged.expert]]
            rows = mine // ids.shape[1]
            out = ops.swiglu(x[rows], *self.tier.layout.unpack(self.staging[staged.slot], x.dtype)).float()
            y.index_add_(0, rows, out * weights.flatten()[mine, None])
            free.append(staged.slot)
        self._streamed[layer] = list(division.streamed)
        self._look_ahead((layer + 1) % len(self.experts))
        return y

    def _stage(self, layer: int, expert: int, slot: int) -> Staged:
        self.copies.after_compute()
        copy_expert(self.experts[layer], expert, self.staging[slot], self.copies)
        return Staged(expert, slot, self.copies.mark())

    def _take(self, layer: int, wanted: Sequence[int]) -> deque[Staged]:
        """What was fetched for this layer and is of use; the rest may be overwritten."""
        found = deque(s for s in self._staged if layer == self._next and s.expert in wanted)
        self._staged.clear()
        return found

    def _look_ahead(self, layer: int) -> None:
        self._next = layer
        for slot, expert in enumerate(self._streamed.get(layer, ())[:STAGES]):
            self._staged.append(self._stage(layer, expert, slot))
