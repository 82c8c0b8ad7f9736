"""Which experts the tokens of a text are routed to: seen by standing in front of the engine's experts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hetero_glm5.llm import LLM
from hetero_glm5.model.moe import Experts, Join
from hetero_glm5.model.state import Clocked

SHARES = (0.05, 0.1, 0.2, 0.5)  # of a layer's experts


class Recorder:
    """Experts that note the ids of every call. `take` gives them for the rows since the last `take`."""

    def __init__(self, experts: Experts):
        self.experts = experts
        self._ids: dict[int, list[Tensor]] = {}

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, clock: Clocked) -> Join:
        self._ids.setdefault(layer, []).append(ids.cpu())
        return self.experts(layer, x, ids, weights, clock)

    def take(self) -> np.ndarray:
        """int64 [tokens, MoE layers, k]."""
        ids = torch.stack([torch.cat(self._ids[layer]) for layer in sorted(self._ids)], dim=1)
        self._ids.clear()
        return ids.numpy()


@contextmanager
def recording(llm: LLM) -> Iterator[Recorder]:
    """Records everything that `llm` computes."""
    runner = llm.engine.runner
    recorder = Recorder(runner.experts)
    runner.experts = recorder
    try:
        yield recorder
    finally:
        runner.experts = recorder.experts


@dataclass(frozen=True)
class Routing:
    """By MoE layer, in order. Entropies are in bits, at most log2(experts). shares[i][layer]: the share of all
    selections that go to the SHARES[i] most used experts of that layer, on the same text: what a static choice of that
    many for each layer could hit at best."""

    experts: int
    selections: int  # in each layer
    entropy: list[float]
    shares: list[list[float]]


def describe(ids: np.ndarray, experts: int) -> Routing:
    """`ids` [tokens, layers, k]."""
    counts = np.stack([np.bincount(layer.reshape(-1), minlength=experts) for layer in ids.transpose(1, 0, 2)])
    most = -np.sort(-counts, axis=1)  # [layers, experts], the most used first
    chosen = [max(1, math.ceil(share * experts)) for share in SHARES]
    return Routing(
        experts=experts,
        selections=int(counts[0].sum()),
        entropy=[entropy(layer) for layer in counts],
        shares=[(most[:, :n].sum(1) / counts.sum(1)).tolist() for n in chosen],
    )


def entropy(counts: np.ndarray) -> float:
    """-sum p log2 p of counts [experts], in bits."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())
