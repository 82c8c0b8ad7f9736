"""A layer of a long prefill, divided between the host and the device.

Experts in slots run on the device. Each other expert that has tokens is computed on the host, in h seconds, or it is
streamed: copied over the link, in c seconds, into one of two staging slots and computed on the device, in d seconds.
The two sides work at once; wanted are the streamed experts with which the later of the two ends first.

    host    host_call + Σ h of the experts that stay
    device  a pipeline: one copy after the other, from `head_start` before the layer on, each into a slot whose expert
            has been computed; one compute after the other, the resident experts first

Order. All copies cost the same, so the longest compute goes first (Johnson's rule) and the shortest is left for when
the last copy has ended; no other order ends earlier by as much as a copy. The device then ends with the longest of
three chains, for k streamed experts of which q have d >= c, at least 1, and B = max(residents done, first copy done):

    computes  B + Σ d
    copies    k·c - head_start + min d
    slots     B + Σ of the q largest d + (k - q - 1)·c + min d, if k > q + 1

The last: a copy waits for its slot, so it is hidden by the one compute before it, while that is the longer. Chains that
change sides more often are no longer than these, because d falls.

Choice. So a streamed expert costs the device max(c, d), but for a copy or two, and the host h: where costs add up, the
best are those with the largest h / max(c, d), up to where both sides end together. With copies as the bound these are
the experts with the most tokens, as the host's time grows with them and a copy's does not. Few experts, or a few large
ones, do not divide so evenly: about that end, every subset of CORE experts is valued with the chains above. None and
all are valued too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetero_glm5.placement.cost import Costs

CORE = 10
GAIN = 1.25  # less is had in short steps too, where fetched experts stay: a link adds 10 to 20 % to the host's memory
LENGTHS = np.unique(np.rint(2 ** np.arange(0, 16.1, 0.125))).astype(np.int64)  # of chunks


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


class _Layer:
    """What does not depend on the choice: the experts that can be streamed, their seconds h and d, and the rest."""

    def __init__(self, tokens: np.ndarray, slot_of: np.ndarray, costs: Costs, head_start: float):
        resident = (slot_of >= 0) & (tokens > 0)
        self.experts = np.flatnonzero((slot_of < 0) & (tokens > 0))
        self.h, self.d = costs.on_host(tokens[self.experts]), costs.on_device(tokens[self.experts])
        self.copy, self.host_call, self.head_start = costs.copy, costs.host_call, head_start
        self.residents = costs.device_call + float(costs.on_device(tokens[resident]).sum())
        self.alone = self.residents if resident.any() else 0.0  # the device's side without streamed experts

    def sides(self, sets: _Sets) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of the host and of the device, [sets] each."""
        k, h, d, long, long_d = sets.sums
        smallest, largest = np.where(k > 0, sets.minima, 0.0) * [[1], [-1]]
        begin = max(self.residents, self.copy - self.head_start)
        first = np.where(long > 0, long_d, largest)  # Σ of the q largest
        waits = k - np.maximum(long, 1) - 1
        device = np.maximum(begin + d, k * self.copy - self.head_start + smallest)
        device = np.maximum(device, np.where(waits > 0, begin + first + waits * self.copy + smallest, 0.0))
        host = self.host_call + np.maximum(self.h.sum() - h, 0.0)
        return np.where(k < len(self.experts), host, 0.0), np.where(k > 0, device, self.alone)


def divide(tokens: np.ndarray, slot_of: np.ndarray, costs: Costs, head_start: float = 0.0) -> Division:
    """tokens int [E] of one layer; slot_of int [E], -1 = not on the device. head_start: seconds for which the link has
    been copying the layer's first streamed experts when the layer begins; an expert whose copy has ended counts as a
    resident one. Takes less than half a millisecond for 256 experts."""
    layer = _Layer(tokens, slot_of, costs, head_start)
    each = _Sets.of(layer.h, layer.d, layer.copy)
    order = np.argsort(-layer.h / np.maximum(layer.d, layer.copy), kind="stable")
    end = int(np.argmin(np.maximum(*layer.sides(each[order].prefixes()))))
    low = max(0, min(end - CORE // 2, len(order) - CORE))
    taken, core = order[:low], order[low : low + CORE]
    host, device = layer.sides(each[taken].prefixes()[-1:].with_subsets_of(each[core]))
    best = np.argmin(np.maximum(host, device))
    chosen = np.concatenate([taken, core[best >> np.arange(len(core)) & 1 == 1]])
    streamed = chosen[np.argsort(-layer.d[chosen], kind="stable")]
    return Division(layer.experts[streamed], float(host[best]), float(device[best]))


def undivided(tokens: np.ndarray, slot_of: np.ndarray, costs: Costs) -> Division:
    """The same layer with nothing streamed."""
    layer = _Layer(tokens, slot_of, costs, 0.0)
    host = costs.host_call + float(layer.h.sum()) if len(layer.experts) else 0.0
    return Division(layer.experts[:0], host, layer.alone)


def threshold(costs: Costs, topk: int, shares: np.ndarray, resident: float = 0.0) -> int | None:
    """The tokens of a prefill chunk from which on dividing its layers is worth it: without, they take at least GAIN
    times as long. None if it is not even for the longest of LENGTHS. shares float [E]: of a layer's routed tokens, by
    expert; resident: the part of the experts that is on the device, taken to be those with the largest shares."""
    slot_of = np.full(len(shares), -1)
    slot_of[np.argsort(-shares, kind="stable")[: round(resident * len(shares))]] = 0

    def worth(length: int) -> bool:
        tokens = np.rint(length * topk * shares / shares.sum()).astype(np.int64)
        return undivided(tokens, slot_of, costs).seconds >= GAIN * divide(tokens, slot_of, costs).seconds

    found = None
    for length in LENGTHS[::-1].tolist():
        if not worth(length):
            break
        found = length
    return found
