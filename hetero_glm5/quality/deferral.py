"""Expert deferral, emulated in front of the engine's experts to see what it costs in quality.

The `count` experts of a token with the smallest weights are added one MoE layer later than the others; the last MoE
layer defers none. Every expert still sees the input of its own layer, and no output is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hetero_glm5.llm import LLM
from hetero_glm5.model.moe import Experts, Join
from hetero_glm5.model.state import Clocked


class Deferred:
    """Experts that defer; called for one MoE layer after the other, as a forward pass does."""

    def __init__(self, experts: Experts, last_layer: int, count: int):
        self.experts, self.last_layer, self.count = experts, last_layer, count
        self._late: Join | None = None

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, clock: Clocked) -> Join:
        late, self._late = self._late, None
        if layer != self.last_layer:
            smallest = weights.topk(self.count, dim=-1, largest=False).indices
            later = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, smallest, True)
            self._late = self.experts(layer, x, ids.masked_fill(~later, -1), weights.masked_fill(~later, 0), clock)
            ids, weights = ids.masked_fill(later, -1), weights.masked_fill(later, 0)
        now = self.experts(layer, x, ids, weights, clock)
        return now if late is None else lambda: now() + late()


@contextmanager
def deferring(llm: LLM, count: int) -> Iterator[None]:
    """`llm` defers `count` experts of each token."""
    runner = llm.engine.runner
    experts = runner.experts
    runner.experts = Deferred(experts, llm.engine.model_config.moe_layers[-1], count)
    try:
        yield
    finally:
        runner.experts = experts
