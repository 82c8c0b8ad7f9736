"""The two tiers of routed experts as one callable.

The planner's slot_of[layer, expert] (-1 = host) is the only description of where an expert is; `slot_of` here is its
copy on the device, which changes between two kernels and never under one. Each call splits a step's top-k by it, starts
the host part, runs the device part, and returns a function that joins and adds the two. With a CUDA device all of this
only enqueues, and the host part runs when the stream gets there; on a CPU device both tiers are the same cores, so it
runs at once.

`Adaptation` is what makes experts move: without it they stay where they were loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hetero_glm5.core import no_clock
from hetero_glm5.experts.counts import RoutingCounts
from hetero_glm5.experts.cpu_tier import CpuExperts
from hetero_glm5.experts.divided import DividedPrefill
from hetero_glm5.experts.gpu_tier import GpuExperts
from hetero_glm5.experts.host_stream import DeviceStream
from hetero_glm5.experts.mover import Mover
from hetero_glm5.placement.planner import Planner

Join = Callable[[], Tensor]  # → fp32 [T, hidden]


@dataclass
class Adaptation:
    """Counts what steps are routed to, asks the planner, moves experts."""

    planner: Planner
    counts: RoutingCounts
    mover: Mover


class ExpertTiers:
    """layers: the model's numbers of the MoE layers; all arrays count these from 0. host: by the model's number, for
    layers with experts on the host. slot_of int [layers, experts]. stream: gives a device's stream to put the host part
    on, None = run it at once. deferred: of a token's experts on the host, so many, those with the smallest weights, are
    added one MoE layer later; those of the last layer never."""

    def __init__(
        self,
        layers: Sequence[int],
        host: dict[int, CpuExperts],
        device: GpuExperts,
        slot_of: np.ndarray,
        *,
        stream: Callable[[torch.device], DeviceStream] | None,
        deferred: int = 0,
    ):
        self.host, self.device, self.stream, self.deferred = host, device, stream, deferred
        self.adaptation: Adaptation | None = None
        self.divided: DividedPrefill | None = None
        self.slot_of = torch.from_numpy(slot_of).to(device.slots.device)
        self._slot_of = slot_of.copy()  # the same, here
        self._index = {layer: i for i, layer in enumerate(layers)}
        self._late: Join | None = None  # what the previous layer deferred

    def begin_step(self, decoded: Tensor) -> None:
        """decoded bool [T], on the CPU: which rows of the step are decoded, not prefilled."""
        self._late = None
        if self.adaptation is not None:
            self.adaptation.counts.begin(decoded)

    def end_step(self) -> None:
        """After the step's last kernel was waited for: experts whose copies have ended come into use, others start."""
        if self.adaptation is None:
            return
        planner, counts, mover = self.adaptation.planner, self.adaptation.counts, self.adaptation.mover
        late, failed = mover.settle()
        for move in failed:
            planner.drop(move)
        counts.drain()
        moves = planner.end_step(*counts.take(), late)
        self._publish(planner.slot_of)
        mover.start(moves)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, clock=no_clock) -> Join:
        """x [T, hidden], ids int64 [T, k], weights fp32 [T, k]. Returns join() → Σ_k w·E_k(x), fp32 [T, hidden]."""
        index = self._index[layer]
        if self.adaptation is not None:
            self.adaptation.counts.add(index, ids)
        if self.divided is not None and len(x) >= self.divided.threshold:
            parts = self._divide(layer, x, ids, weights, clock)
        else:
            self._fetch(index, ids, clock)
            parts = self._split(layer, x, ids, weights, clock)
        return lambda: _sum(parts, clock)

    def _split(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, clock) -> list[Join]:
        index, late = self._index[layer], self._late
        slots = self.slot_of[index][ids]
        on_host, parts = ids.masked_fill(slots >= 0, -1), []
        self._late = None
        if layer in self.host:
            later = None
            if self.deferred and index + 1 < len(self._index):
                later = smallest(on_host, weights, self.deferred)
            with clock("host_experts"):
                now = on_host if later is None else on_host.masked_fill(later, -1)
                parts.append(self._start_host(layer, x, now, weights))
                if later is not None:
                    self._late = self._start_host(layer, x, on_host.masked_fill(~later, -1), weights)
        if (self._slot_of[index] >= 0).any():
            with clock("device_experts"):
                y = self.device(x, slots, weights)
            parts.append(lambda: y)
        return parts if late is None else [*parts, late]

    def _divide(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, clock) -> list[Join]:
        """The layer of a long prefill, in which nothing is deferred."""
        index, late, divided = self._index[layer], self._late, self.divided
        assert divided is not None
        self._late = None
        slots, host_ids = self.slot_of[index][ids], ids.cpu().numpy()  # waits for the router
        division = divided.divide(index, host_ids, self._slot_of[index])
        on_host = torch.from_numpy(division.on_host).to(ids.device)
        with clock("host_experts"):
            parts = [self._start_host(layer, x, ids.masked_fill(~on_host[ids], -1), weights)]
        with clock("device_experts"):
            y = divided.streamed(index, division, x, host_ids, weights)
            if (self._slot_of[index] >= 0).any():
                y += self.device(x, slots, weights)
        parts.append(lambda: y)
        return parts if late is None else [*parts, late]

    def _fetch(self, index: int, ids: Tensor, clock) -> None:
        """Co-execution: some of the experts that are missed come to the device while the host computes the others."""
        if self.adaptation is None or not self.adaptation.planner.may_fetch(ids.numel()):
            return
        planner = self.adaptation.planner
        with clock("device_experts"):
            tokens = np.bincount(ids.flatten().cpu().numpy(), minlength=self._slot_of.shape[1])  # waits for the router
            moves = planner.fetch(index, tokens)
            self._publish(planner.slot_of)
            try:
                self.adaptation.mover.fetch(moves)
            except RuntimeError:
                for move in moves:
                    planner.drop(move)
                self._publish(planner.slot_of)
                raise

    def _publish(self, slot_of: np.ndarray) -> None:
        changed = np.nonzero(slot_of != self._slot_of)
        if len(changed[0]):
            values = slot_of[changed]
            self._slot_of[changed] = values
            self.slot_of[tuple(map(torch.from_numpy, changed))] = torch.from_numpy(values).to(self.slot_of.device)

    def _start_host(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Join:
        if self.stream is None:
            y = self.host[layer](x, ids, weights)
            return lambda: y
        return self.host[layer].start(self.stream(x.device), x, ids, weights)


def smallest(ids: Tensor, weights: Tensor, count: int) -> Tensor:
    """bool [T, k]: of each row's ids that are not -1, the `count` with the smallest weights."""
    order = weights.masked_fill(ids < 0, torch.inf).argsort(dim=1, stable=True)
    chosen = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, order[:, :count], True)
    return chosen & (ids >= 0)


def _sum(parts: list[Join], clock) -> Tensor:
    assert parts, "a layer has experts on neither tier"
    with clock("host_experts"):
        total = parts[0]()
        for part in parts[1:]:
            total = total + part()
    return total
