"""A layer of a long prefill, divided between the host and the device.

Experts in slots run on the device. Each other expert that has tokens is computed on the host, in h seconds, or streamed:
copied over the link, in c seconds, into one of two staging slots and computed on the device, in d seconds. The two sides
work at once; wanted are the streamed experts with which the later of the two ends first.

    host    host_call + Σ h of the experts that stay
    device  a pipeline: one copy after the other, from `head_start` before the layer on, each into a slot whose expert
            has been computed; one compute after the other, the resident experts first

Order. All copies cost the same, so the longest compute goes first (Johnson's rule): the smallest is left for when the
last copy has ended. In this order the device's end is the longest of three chains, for k streamed experts of which q
have d >= c, at least 1, and B = max(residents computed, first copy ended):

    computes  B + Σ d
    copies    k·c - head_start + min d
    slots     B + Σ of the q largest d + (k - q - 1)·c + min d, if k > q + 1

The last: while d >= c a copy fits behind the compute before it; from the first shorter one on, each copy that the slots
held back is waited for. Other chains are no longer, because d falls: one exchange of a copy for a compute after the
other leads to one of the three.

Choice. A copy costs the same whatever the tokens, the host's time grows with them. So while copies bound the device,
the k experts with the largest h are the best k. Where computes bound it, this is the partition of numbers: h / d
decides, and single experts make the difference. Hence all prefixes of three orders (h falling, h rising, h / max(c, d)
falling) are valued at once, among them none and all; then all subsets of the CORE experts about the best one's end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetero_glm5.placement.cost import Costs

CORE = 10


@dataclass(frozen=True)
class Division:
    """streamed: int64, experts in the order of their copies. Predicted seconds of both sides."""

    streamed: np.ndarray
    host_seconds: float
    device_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.host_seconds, self.device_seconds)


class _Sets:
    """Many sets of streamed experts, by what their times depend on: float64 sums [5, sets] of 1, h, d, [d >= c] and
    d·[d >= c] over the members, and minima [2, sets] of d and -d."""

    def __init__(self, sums: np.ndarray, minima: np.ndarray):
        self.sums, self.minima = sums, minima

    @classmethod
    def of(cls, h: np.ndarray, d: np.ndarray, copy: float) -> _Sets:
        """Each expert by itself."""
        long = d >= copy
        return cls(np.stack([np.ones_like(d), h, d, long, d * long]), np.stack([d, -d]))

    def __getitem__(self, chosen: np.ndarray | slice) -> _Sets:
        return _Sets(self.sums[:, chosen], self.minima[:, chosen])

    def prefixes(self) -> _Sets:
        """The first 0, 1, ... all of them united."""
        none = np.zeros((5, 1)), np.full((2, 1), np.inf)
        sums, minima = np.cumsum(self.sums, 1), np.minimum.accumulate(self.minima, 1)
        return _Sets(np.hstack([none[0], sums]), np.hstack([none[1], minima]))

    def with_subsets_of(self, core: _Sets) -> _Sets:
        """This one set united with each subset of those in `core`; bit i of its number tells whether core[i] is in."""
        sums, minima = self.sums, self.minima
        for i in range(core.sums.shape[1]):
            one = core[i : i + 1]
            sums = np.hstack([sums, sums + one.sums])
            minima = np.hstack([minima, np.minimum(minima, one.minima)])
        return _Sets(sums, minima)


@dataclass(frozen=True)
class _Layer:
    """What does not depend on the choice, in seconds."""

    copy: float
    head_start: float
    resident: float  # when the device can begin with streamed experts
    alone: float  # the device's side without any
    host_call: float
    host_all: float  # Σ h
    experts: int

    def sides(self, sets: _Sets) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the host and of the device, [sets] each."""
        k, h, d, long, long_d = sets.sums
        smallest, largest = sets.minima[0], -sets.minima[1]
        begin = max(self.resident, self.copy - self.head_start)
        first = np.where(long > 0, long_d, largest)  # Σ of the q largest
        waited = k - np.maximum(long, 1) - 1
        device = np.maximum(begin + d, k * self.copy - self.head_start + smallest)
        device = np.maximum(device, np.where(waited > 0, begin + first + waited * self.copy + smallest, 0.0))
        host = np.maximum(self.host_all - h, 0.0) + self.host_call
        return np.where(k < self.experts, host, 0.0), np.where(k > 0, device, self.alone)


def divide(tokens: np.ndarray, slot_of: np.ndarray, costs: Costs, head_start: float = 0.0) -> Division:
    """tokens int [E] of one layer; slot_of int [E], -1 = not on the device. head_start: seconds for which the link has
    been copying the layer's first streamed experts when the layer begins; a copy that has ended makes its expert a
    resident one. Cost: a few hundred microseconds for 256 experts."""
    resident = (slot_of >= 0) & (tokens > 0)
    experts = np.flatnonzero((slot_of < 0) & (tokens > 0))
    h, d, copy = costs.on_host(tokens[experts]), costs.on_device(tokens[experts]), costs.copy
    busy = costs.device_call + float(costs.on_device(tokens[resident]).sum())
    alone = busy if resident.any() else 0.0
    layer = _Layer(copy, head_start, busy, alone, costs.host_call, float(h.sum()), len(experts))
    each = _Sets.of(h, d, copy)
    best, streamed, sides = np.inf, experts[:0], (0.0, 0.0)

    def consider(sets: _Sets) -> int | None:
        """The number of the best of `sets`, if it is better than what was seen."""
        nonlocal best, sides
        host, device = layer.sides(sets)
        i = int(np.argmin(np.maximum(host, device)))
        if max(host[i], device[i]) >= best:
            return None
        sides = float(host[i]), float(device[i])
        best = max(sides)
        return i

    falling = np.argsort(-h, kind="stable")
    for order in (falling, falling[::-1], np.argsort(-h / np.maximum(d, copy), kind="stable")):
        if (k := consider(each[order].prefixes())) is not None:
            chosen, end = order, k
    low = max(0, min(end - CORE // 2, len(experts) - CORE))
    streamed, core = chosen[:end], chosen[low : low + CORE]
    rest = each[chosen[:low]].prefixes()[-1:]
    if (bits := consider(rest.with_subsets_of(each[core]))) is not None:
        streamed = np.concatenate([chosen[:low], core[bits >> np.arange(len(core)) & 1 == 1]])
    streamed = streamed[np.argsort(-d[streamed], kind="stable")]
    return Division(experts[streamed], *sides)
