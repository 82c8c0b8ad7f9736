"""What others do, as planners to compare with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from hetero_glm5.placement.planner import Move, Static
from hetero_glm5.placement.trace import Steps


class _Cache(Static, ABC):
    """Fetches misses into the slots of lowest `priority` [layers, experts], over one pool."""

    bypass = False  # whether a miss that has a lower priority than what it would replace stays on the host

    def __init__(self, slot_of: np.ndarray):
        super().__init__(slot_of)
        self.priority = np.zeros(slot_of.shape, dtype=np.int64)
        held = np.flatnonzero(self.slot_of.ravel() >= 0)
        self._holder = np.empty(len(held), dtype=np.int64)  # of each slot, layer·experts + expert
        self._holder[self.slot_of.ravel()[held]] = held
        self._step = 0

    def fetch(self, layer: int, tokens: np.ndarray) -> list[Move]:
        used = np.flatnonzero(tokens)
        self._touch(layer, used)
        priority, slots, first = self.priority.ravel(), self.slot_of.ravel(), layer * len(tokens)
        used += first
        misses = used[slots[used] < 0]
        held = priority[self._holder]
        held[slots[used[slots[used] >= 0]]] = np.iinfo(np.int64).max  # they are being computed
        count = min(len(misses), len(held))
        into = np.argpartition(held, count - 1)[:count] if count else np.arange(0)
        into = into[np.argsort(held[into], kind="stable")]
        misses = misses[np.argsort(-priority[misses], kind="stable")][:count]
        wanted = held[into] < (priority[misses] if self.bypass else np.iinfo(np.int64).max)
        into, misses = into[wanted], misses[wanted]
        slots[self._holder[into]] = -1
        slots[misses] = into
        self._holder[into] = misses
        return [Move(layer, e - first, s) for e, s in zip(misses.tolist(), into.tolist(), strict=True)]

    def may_fetch(self, routed: int) -> bool:
        return True

    @abstractmethod
    def _touch(self, layer: int, used: np.ndarray) -> None:
        """Sets the priorities of a layer's experts that are being used."""

    def end_step(self, decode: np.ndarray, prefill: np.ndarray, late: int = 0) -> list[Move]:
        self._step += 1
        return []


class LRU(_Cache):
    """Fetches every miss in place of the least recently used expert."""

    def _touch(self, layer: int, used: np.ndarray) -> None:
        self.priority[layer, used] = self._step * len(self.priority) + layer + 1


class LFU(_Cache):
    """Fetches every miss in place of the least often used expert."""

    def _touch(self, layer: int, used: np.ndarray) -> None:
        self.priority[layer, used] += 1


class Belady(_Cache):
    """Knows the whole trace: fetches a miss in place of the expert that is used again last, unless that is itself. No
    sequence of fetches hits more often."""

    bypass = True

    def __init__(self, slot_of: np.ndarray, steps: Steps):
        super().__init__(slot_of)
        layers = len(slot_of)
        never = (len(steps) + 1) * layers
        upcoming = np.full(slot_of.shape, never, dtype=np.int32)
        self._next = np.empty(steps.decode.shape, dtype=np.int32)  # use after this step
        timed, number = steps.timed, np.arange(layers, dtype=np.int32)[:, None]
        for step in range(len(steps) - 1, -1, -1):
            self._next[step] = upcoming
            if timed[step]:
                np.copyto(upcoming, step * layers + number, where=steps.decode[step] > 0)
        self.priority = -upcoming.astype(np.int64)

    def _touch(self, layer: int, used: np.ndarray) -> None:
        self.priority[layer, used] = -self._next[self._step, layer, used].astype(np.int64)


class KTDynamic(Static):
    """KTransformers' --kt-enable-dynamic-expert-update: after a prefill of at least `threshold` tokens each layer's
    slots are given to the experts that this prefill used most, without history; all of them are copied, residents too,
    and the next step waits for it."""

    def __init__(self, slot_of: np.ndarray, threshold: int, top_k: int):
        super().__init__(slot_of)
        self._rows = threshold * top_k

    def end_step(self, decode: np.ndarray, prefill: np.ndarray, late: int = 0) -> list[Move]:
        if prefill.sum() < self._rows * len(prefill):
            return []
        moves = []
        for layer, counts in enumerate(prefill):
            slots = np.sort(self.slot_of[layer][self.slot_of[layer] >= 0])
            chosen = np.argsort(-counts, kind="stable")[: len(slots)]
            self.slot_of[layer] = -1
            self.slot_of[layer, chosen] = slots
            moves += [Move(layer, e, s) for e, s in zip(chosen.tolist(), slots.tolist(), strict=True)]
        return moves


def most_hits(steps: Steps, slots: int, fetches: int, warm_up: int = 0) -> float:
    """Belady's optimum for a number of fetches: no planner that fetches only what it misses, `fetches` times at most in
    the timed steps after the warm-up, hits a larger share of uses, whatever is in its `slots` when they begin.

    It is the dual bound. Let a fetch cost `fetch` hits and a slot `rent` hits for a step: then each expert can be
    decided for itself, and what all gain together, with the fetches and slots there are paid back, bounds the optimum
    for any prices. The prices with the lowest bound are searched, one after the other.
    """
    timed = steps.timed
    timed[:warm_up] = False
    step, layer, expert = np.nonzero(steps.decode[timed])
    owner = layer * steps.decode.shape[2] + expert
    order = np.argsort(owner, kind="stable")
    owner, when = owner[order], step[order]
    _, first, uses = np.unique(owner, return_index=True, return_counts=True)
    most_used = np.argsort(-uses, kind="stable")
    first, uses = first[most_used], uses[most_used]
    rounds = [first[: np.searchsorted(-uses, -i, side="left")] + i for i in range(uses.max())]
    times = [when[index] for index in rounds]
    gaps = [times[0], *(now - before[: len(now)] for before, now in pairwise(times))]
    length = int(timed.sum())

    def bound(fetch: float, rent: float) -> float:
        held, best = np.zeros(len(first)), np.zeros(len(first))  # gain with the expert in a slot, and either way
        for gap in gaps:
            now = len(gap)
            held[:now] = np.maximum(held[:now] - rent * gap + 1, best[:now] - fetch)
            best[:now] = np.maximum(best[:now], held[:now])
        return best.sum() + fetch * fetches + rent * slots * length

    fetch, rent = 0.3, 0.02
    for _ in range(4):
        fetch = _lowest(lambda price: bound(price, rent), 1.0)  # noqa: B023 - called at once
        rent = _lowest(lambda price: bound(fetch, price), 1.0)  # noqa: B023
    return bound(fetch, rent) / len(when)


def _lowest(function: Callable[[float], float], high: float) -> float:
    """Where a convex function of [0, high] is lowest, searched over magnitudes."""
    grid = np.concatenate(([0.0], high * 10 ** np.linspace(-4, 0, 9)))
    values = [function(x) for x in grid]
    best = int(np.argmin(values))
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    for _ in range(8):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if function(a) < function(b) else (a, high)
    return (low + high) / 2
