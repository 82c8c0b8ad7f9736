"""When experts move between the tiers: the planners that engine and simulator hold.

Two ways lead to the device. A *fetch* happens inside a step: of a layer's misses some are copied and computed on the
device while the host computes the others, and stay. A *move* is ordered between steps and copied behind the next one.
A planner decides by `Costs` and counts alone, never by a clock, so that the same trace gives the same decisions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hetero_glm5.placement.cost import Costs
from hetero_glm5.placement.forecast import Forecast


@dataclass(frozen=True)
class Move:
    """`expert` of `layer`, an index of MoE layers, takes `slot`; whoever holds it loses it."""

    layer: int
    expert: int
    slot: int


class Planner(Protocol):
    """`slot_of` int64 [layers, experts], -1 = host: what the next step may use. Only the methods change it."""

    slot_of: np.ndarray

    def fetch(self, layer: int, tokens: np.ndarray) -> list[Move]:
        """During a step, when `layer` has been routed; tokens int64 [experts], rows of this step. The experts to copy
        now and to compute on the device in this very step; slot_of has them on return."""

    def may_fetch(self, routed: int) -> bool:
        """Whether fetch() is to be called for a layer in which rows chose experts `routed` times in all."""

    def drop(self, move: Move) -> None:
        """The copy of a move or of a fetch has failed: its expert is on the host, and its slot is nobody's."""

    def end_step(self, decode: np.ndarray, prefill: np.ndarray, late: int = 0) -> list[Move]:
        """After a step; rows int64 [layers, experts] of its decode and of its prefill. The moves of the previous call
        land, all but the newest `late` in flight, which land at a later call. Then new ones are ordered: a victim
        loses its slot at once, and the newcomer has it when it lands."""


class Static:
    """Nothing moves."""

    def __init__(self, slot_of: np.ndarray):
        self.slot_of = slot_of.astype(np.int64)

    def fetch(self, layer: int, tokens: np.ndarray) -> list[Move]:
        return []

    def may_fetch(self, routed: int) -> bool:
        return False

    def drop(self, move: Move) -> None:
        pass

    def end_step(self, decode: np.ndarray, prefill: np.ndarray, late: int = 0) -> list[Move]:
        return []


class Adaptive:
    """Holds the experts that are expected to be used most, over one pool of slots for all layers.

    A copy reads an expert once from host memory, as a miss does, so a move pays if it spares one use while the newcomer
    is the better of the two, which is taken to be three of the forecast's horizons. A fetch reads what the host would
    have read, so there it is enough to be expected more often. `costs` bound both: fetches must shorten their layer,
    moves must hide behind a step.
    """

    MARGIN = 1 / 3  # uses in a horizon

    def __init__(self, slot_of: np.ndarray, costs: Costs):
        self.slot_of = slot_of.astype(np.int64)
        self.costs = costs
        self._forecast = Forecast(*slot_of.shape)
        self._in_flight: list[Move] = []
        self._coming = np.zeros(slot_of.shape, dtype=bool)  # in flight
        self._empty: list[int] = []  # slots that nobody holds, because copies to them failed
        self._victims = np.flatnonzero(self.slot_of.ravel() >= 0)  # least expected first
        self._taken = 0  # of the victims, from the front
        self._fetched = np.zeros(slot_of.shape, dtype=bool)  # in this step
        self._hidden = 0.0  # seconds for which the link was free in the last step with decode

    def fetch(self, layer: int, tokens: np.ndarray) -> list[Move]:
        expected, slots = self._forecast.expected, self.slot_of[layer]
        used = np.flatnonzero(tokens)
        hits, misses = used[slots[used] >= 0], used[slots[used] < 0]
        coming = self._coming[layer]
        misses = misses[np.lexsort((-expected[layer, misses], coming[misses]))]
        most = self._fetch_count(tokens[hits], tokens[misses])
        moves = []
        for expert in misses[:most].tolist():
            victim = self._next_victim(layer, tokens)
            if coming[expert] or victim is None or expected.flat[victim] >= expected[layer, expert]:
                break
            self._taken += 1
            slot = int(self.slot_of.flat[victim])
            self.slot_of.flat[victim] = -1
            slots[expert] = slot
            moves.append(Move(layer, expert, slot))
            self._fetched[layer, expert] = True
        return moves

    def may_fetch(self, routed: int) -> bool:
        all_missed = np.ones(min(routed, self.slot_of.shape[1]), dtype=np.int64)
        return self._fetch_count(all_missed[:0], all_missed) > 0

    def drop(self, move: Move) -> None:
        if move in self._in_flight:
            self._in_flight.remove(move)
            self._coming[move.layer, move.expert] = False
        self.slot_of[move.layer, move.expert] = -1
        self._empty.append(move.slot)

    def _fetch_count(self, hits: np.ndarray, misses: np.ndarray) -> int:
        return fetch_count(self.costs, hits, misses)

    def _next_victim(self, layer: int, tokens: np.ndarray) -> int | None:
        """The least expected expert that holds a slot and is not used by `layer` in this step."""
        while self._taken < len(self._victims):
            victim = int(self._victims[self._taken])
            owner, expert = divmod(victim, len(tokens))
            if owner != layer or not tokens[expert]:
                return victim
            self._taken += 1
        return None

    def end_step(self, decode: np.ndarray, prefill: np.ndarray, late: int = 0) -> list[Move]:
        if decode.any():
            self._hidden = self._free_link(decode)
        landed = len(self._in_flight) - late
        for move in self._in_flight[:landed]:
            self.slot_of[move.layer, move.expert] = move.slot
            self._coming[move.layer, move.expert] = False
        self._in_flight = self._in_flight[landed:]
        self._forecast.observe(decode, prefill)
        moves = self._order(int(self._hidden / self.costs.copy) - late)
        self._in_flight += moves
        self._fetched[:] = False
        return moves

    def _free_link(self, decode: np.ndarray) -> float:
        step = self.costs.layers(decode, (self.slot_of >= 0) & ~self._fetched, self._fetched)
        return float(step.seconds.sum() - step.link.sum())

    def _order(self, most: int) -> list[Move]:
        """At most `most` moves, the best first; what remains in slots becomes the next step's victims."""
        expected, slots = self._forecast.expected.ravel(), self.slot_of.ravel()
        newcomers, victims = np.flatnonzero((slots < 0) & ~self._coming.ravel()), np.flatnonzero(slots >= 0)
        victims = victims[np.argsort(expected[victims], kind="stable")]
        newcomers = newcomers[np.argsort(-expected[newcomers], kind="stable")]
        empty = len(self._empty)
        pairs = max(0, min(most, empty + len(victims), len(newcomers)))
        lost = np.concatenate((np.full(empty, -np.inf), expected[victims]))[:pairs]
        count = int((expected[newcomers[:pairs]] - lost > self.MARGIN).sum())  # falling
        free = np.concatenate((np.array(self._empty, dtype=np.int64), slots[victims]))[:count].tolist()
        layers, experts = np.divmod(newcomers[:count], self.slot_of.shape[1])
        moves = [Move(*move) for move in zip(layers.tolist(), experts.tolist(), free, strict=True)]
        evicted = max(0, count - empty)
        slots[victims[:evicted]] = -1
        self._coming.ravel()[newcomers[:count]] = True
        self._victims, self._taken, self._empty = victims[evicted:], 0, self._empty[count:]
        return moves


def fetch_count(costs: Costs, hits: np.ndarray, misses: np.ndarray) -> int:
    """How many of the first `misses` to fetch so that a layer is done soonest, the fewest of equals; hits and misses
    are rows of each expert, int64. The device computes the hits while the link copies, then what was copied."""
    if not len(misses):
        return 0
    on_host, on_device = costs.on_host(misses), costs.on_device(misses)
    hit = float(costs.on_device(hits).sum())
    host, late = float(on_host.sum()), 0.0
    best, soonest = 0, max(host + costs.host_call, hit + costs.device_call * (hit > 0))
    for count, (left, fetched) in enumerate(zip(on_host.tolist(), on_device.tolist(), strict=True), 1):
        host, late = host - left, late + fetched
        on_host_side = host + costs.host_call if count < len(misses) else 0.0
        device_side = max(hit, count * costs.copy) + late + costs.device_call
        if device_side >= soonest:
            break
        if on_host_side < soonest:
            best, soonest = count, max(on_host_side, device_side)
    return best
