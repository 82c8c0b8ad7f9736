"""The device tier: routed experts in slots of device memory, one pool over all layers.

A slot holds one packed blob, the same bytes the host tier computes from, so filling a slot is one copy. The
matrices are unpacked when they are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_glm5.ops import reference as ops
from hetero_glm5.weights.quantize import ExpertLayout


class GpuExperts:
    """`num_slots` slots on `device` (any torch device)."""

    def __init__(self, layout: ExpertLayout, num_slots: int, device: str):
        self.layout = layout
        self.slots = torch.empty(num_slots, layout.blob_bytes, dtype=torch.uint8, device=device)

    def __call__(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, hidden]; slot_ids [T, k], -1 = not on this tier; weights fp32 [T, k]. Returns fp32 [T, hidden]."""
        return ops.experts(x, slot_ids, weights, lambda slot: self.layout.unpack(self.slots[slot], x.dtype))

    def add(self, y: Tensor, x: Tensor, weights: Tensor, places: Tensor, blob: Tensor) -> None:
        """Adds the part of one expert whose packed `blob` is on the device to y fp32 [T, hidden]; places int64 [n]:
        where in weights [T, k], flat, it was chosen, once a row."""
        rows = places // weights.shape[1]
        out = ops.swiglu(x[rows], *self.layout.unpack(blob, x.dtype)).float()
        y.index_add_(0, rows, out * weights.flatten()[places, None])
