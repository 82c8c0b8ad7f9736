"""The two tiers of routed experts as one callable.

slot_of[layer, expert] (-1 = host) is the only description of where an expert is. Each call splits a step's top-k by it,
starts the host part, runs the device part, and returns a function that joins and adds the two. With a CUDA device all
of this only enqueues, and the host part runs when the stream gets there; on a CPU device both tiers are the same cores,
so it runs at once. With an `Adaptation` slot_of changes, between two kernels and never under one; else experts stay
where they were loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hetero_glm5.core import no_clock
from hetero_glm5.experts.adaptation import Adaptation
from hetero_glm5.experts.copies import Copies
from hetero_glm5.experts.cpu_tier import CpuExperts
from hetero_glm5.experts.divided import DividedPrefill
from hetero_glm5.experts.gpu_tier import GpuExperts
from hetero_glm5.experts.host_reads import HostReads
from hetero_glm5.experts.host_stream import DeviceStream
from hetero_glm5.experts.recording import Recording

Join = Callable[[], Tensor]  # → fp32 [T, hidden]


class ExpertTiers:
    """layers: the model's numbers of the MoE layers; all arrays count these from 0. host: by the model's number, for
    layers with experts on the host. slot_of int [layers, experts]. stream: gives a device's stream to put the host part
    on, None = run it at once. Attributes to set: what records routing, what makes experts move, what divides long
    prefills, and `deferred`: of a token's experts on the host, so many, those with the smallest weights, are added one
    MoE layer later (those of the last layer never)."""

    def __init__(
        self,
        layers: Sequence[int],
        host: dict[int, CpuExperts],
        device: GpuExperts,
        slot_of: np.ndarray,
        *,
        stream: Callable[[torch.device], DeviceStream] | None,
    ):
        self.host, self.device, self.stream = host, device, stream
        self.recording: Recording | None = None
        self.adaptation: Adaptation | None = None
        self.divided: DividedPrefill | None = None
        self.pinning: list[Copies] = []  # what has pinned the host's experts
        self.deferred = 0
        self.reads = HostReads()
        self.slot_of = torch.tensor(slot_of, device=device.slots.device)
        self._slot_of = slot_of.copy()  # the same, here
        self._look()
        self._index = {layer: i for i, layer in enumerate(layers)}
        self._late: Join | None = None  # what the previous layer deferred

    def close(self) -> None:
        """Waits for copies of experts, and lets go of their memory."""
        for user in (self.adaptation and self.adaptation.mover, self.divided and self.divided.copies, *self.pinning):
            if user:
                user.close()

    @property
    def copied_bytes(self) -> dict[str, int]:
        """Of experts, host to device, since the start: moved into slots behind the steps, fetched into them within one,
        and streamed for one layer of a long prefill."""
        mover = None if self.adaptation is None else self.adaptation.mover
        return {
            "moved": 0 if mover is None else mover.moved_bytes,
            "fetched": 0 if mover is None else mover.fetched_bytes,
            "streamed": 0 if self.divided is None else self.divided.streamed_bytes,
        }

    def slots(self, layer: int) -> Tensor:
        """int64 [experts] of one of the model's layers, -1 = host."""
        return self.slot_of[self._index[layer]]

    def begin_step(self, decoded: Tensor) -> None:
        """decoded bool [T], on the CPU: which rows of the step are decoded, not prefilled."""
        self._late = None
        self.reads.begin(decoded)
        if self.recording is not None:
            self.recording.begin(decoded)
        if self.adaptation is not None:
            self.adaptation.begin(decoded)

    def end_step(self) -> None:
        """After the step's last kernel was waited for: moves that have ended come into use, others begin."""
        self.reads.end()
        if self.recording is not None:
            self.recording.end()
        if self.adaptation is not None:
            self.adaptation.end()
            self._publish(self.adaptation.slot_of)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, clock=no_clock) -> Join:
        """x [T, hidden], ids int64 [T, k], weights fp32 [T, k]. Returns join() → Σ_k w·E_k(x), fp32 [T, hidden]."""
        index = self._index[layer]
        late, self._late = self._late, None
        if self.recording is not None:
            self.recording.routed(index, ids, self._resident[index])
        if self.adaptation is not None:
            self.adaptation.routed(index, ids, self._resident[index])
        if self.divided is not None and len(x) >= self.divided.threshold:
            parts = self._divide(self.divided, layer, x, ids, weights, clock)
        else:
            if self.adaptation is not None:
                with clock("device_experts"):
                    self._fetch(self.adaptation, index, ids)
            parts = self._split(layer, x, ids, weights, clock)
        return lambda: _sum(parts if late is None else [*parts, late], clock)

    def _split(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, clock) -> list[Join]:
        index, parts = self._index[layer], []
        slots = self.slots(layer)[ids] if self._on_device[index] else None
        if self._on_host[index]:
            on_host = ids if slots is None else ids.masked_fill(slots >= 0, -1)
            with clock("host_experts"):
                if self.deferred and index + 1 < len(self._index):
                    later = smallest(on_host, weights, self.deferred)
                    parts.append(self._start_host(layer, x, on_host.masked_fill(later, -1), weights))
                    self._late = self._start_host(layer, x, on_host.masked_fill(~later, -1), weights)
                else:
                    parts.append(self._start_host(layer, x, on_host, weights))
        if slots is not None:
            with clock("device_experts"):
                y = self.device(x, slots, weights)
            parts.append(lambda: y)
        return parts

    def _divide(
        self, divided: DividedPrefill, layer: int, x: Tensor, ids: Tensor, weights: Tensor, clock
    ) -> list[Join]:
        """The layer of a long prefill, in which nothing is deferred."""
        index, parts = self._index[layer], []
        host_ids = ids.cpu().numpy()  # waits for the router
        on_host = divided.begin(index, host_ids, self._slot_of[index])
        if on_host.any():
            elsewhere = torch.from_numpy(~on_host).to(ids.device)[ids]
            with clock("host_experts"):
                parts.append(self._start_host(layer, x, ids.masked_fill(elsewhere, -1), weights))
        if self._on_device[index]:
            with clock("device_experts"):
                resident = self.device(x, self.slots(layer)[ids], weights)
            parts.append(lambda: resident)
        if divided.begun:
            with clock("device_experts"):
                y = divided.compute(index, x, host_ids, weights)
            parts.append(lambda: y)
        return parts

    def _fetch(self, adaptation: Adaptation, index: int, ids: Tensor) -> None:
        try:
            adaptation.fetch(index, ids)
        finally:
            self._publish(adaptation.slot_of)

    def _publish(self, slot_of: np.ndarray) -> None:
        changed = np.nonzero(slot_of != self._slot_of)
        if len(changed[0]):
            values = slot_of[changed]
            self._slot_of[changed] = values
            self._look()
            self.slot_of[tuple(map(torch.from_numpy, changed))] = torch.from_numpy(values).to(self.slot_of.device)

    def _look(self) -> None:
        """Which experts the device holds, and which layers have any on either side."""
        self._resident = self._slot_of >= 0
        self._on_device, self._on_host = self._resident.any(1).tolist(), (~self._resident).any(1).tolist()

    def _start_host(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Join:
        if self.stream is None:
            host = self.host[layer]
            y = self.reads.timed(ids, self.device.layout.blob_bytes, lambda: host(x, ids, weights))
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
