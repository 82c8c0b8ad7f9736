"""What the expert-distribution recorder hears of each step, while it records."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hetero_glm5.experts.counts import RoutingCounts
from hetero_glm5.placement.record import DistributionRecorder


class Recording:
    """A step is begin(), for each MoE layer routed(), and end(). Nothing is counted unless `recorder` records when a
    step begins."""

    def __init__(self, recorder: DistributionRecorder, counts: RoutingCounts):
        self.recorder, self.counts = recorder, counts
        self._on_device = np.zeros(counts.shape, dtype=bool)
        self._heard = False

    def begin(self, decoded: Tensor) -> None:
        """decoded bool [T]: which rows of the step are decoded, not prefilled."""
        self._heard = self.recorder.recording
        if self._heard:
            self.counts.begin(decoded)

    def routed(self, layer: int, ids: Tensor, on_device: np.ndarray) -> None:
        """ids int64 [T, k] of a layer's rows; on_device bool [experts]: which experts the device held for them."""
        if self._heard:
            self.counts.add(layer, ids)
            self._on_device[layer] = on_device

    def end(self) -> None:
        """After the step's last kernel was waited for."""
        if self._heard:
            self.counts.drain()
            self.recorder.observe(*self.counts.take(), self._on_device)
