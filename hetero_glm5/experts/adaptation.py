"""What makes experts move: counts what steps are routed to, asks the planner, has the mover copy."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hetero_glm5.experts.counts import RoutingCounts
from hetero_glm5.experts.mover import Mover
from hetero_glm5.placement.planner import Planner


class Adaptation:
    """A step is begin(), for each MoE layer routed(), and end(). `slot_of` is the planner's."""

    def __init__(self, planner: Planner, counts: RoutingCounts, mover: Mover):
        self.planner, self.counts, self.mover = planner, counts, mover
        self._only_decode = False
        self.routed_to = {"device": 0, "host": 0}  # selections since the start, by where their expert was
        self._on_device = np.zeros(counts.shape, dtype=bool)

    @property
    def slot_of(self) -> np.ndarray:
        return self.planner.slot_of

    def begin(self, decoded: Tensor) -> None:
        """decoded bool [T], on the CPU: which rows of the step are decoded, not prefilled."""
        self._only_decode = bool(decoded.all())
        self.counts.begin(decoded)

    def routed(self, layer: int, ids: Tensor, on_device: np.ndarray) -> None:
        """ids int64 [T, k] of a layer's rows; on_device bool [experts]: which experts the device held for them."""
        self.counts.add(layer, ids)
        self._on_device[layer] = on_device

    def fetch(self, layer: int, ids: Tensor) -> None:
        """Co-execution in a step that only decodes: some of the experts that the layer misses come to the device, while
        the host computes the others. What the device is asked from here on finds them there."""
        if not self._only_decode or not self.planner.may_fetch(ids.numel()):
            return
        rows = ids.flatten().cpu().numpy()  # waits for the router
        moves = self.planner.fetch(layer, np.bincount(rows, minlength=self.slot_of.shape[1]))
        try:
            self.mover.fetch(moves)
        except BaseException:
            for move in moves:
                self.planner.drop(move)
            raise

    def end(self) -> None:
        """After the step's last kernel was waited for: experts whose copies have ended come into use, others start."""
        late, failed = self.mover.settle()
        for move in failed:
            self.planner.drop(move)
        self.counts.drain()
        decode, prefill = self.counts.take()
        hits = int((decode + prefill)[self._on_device].sum())
        self.routed_to["device"] += hits
        self.routed_to["host"] += int(decode.sum() + prefill.sum()) - hits
        self.mover.start(self.planner.end_step(decode, prefill, late))
