"""What a planner makes of a trace on a machine: the engine's own decisions, with modelled times.

A timed step decodes and does nothing else. In it each layer is routed, the planner fetches, and the layer takes what
`Costs` says; moves are copied behind it as far as the link is free, the rest later. A step waits for moves that
the planner has put in use at once, and for nothing else. Steps with prefill rows only tell the planner what was routed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetero_glm5.placement.cost import Costs
from hetero_glm5.placement.planner import Planner
from hetero_glm5.placement.trace import Steps


@dataclass(frozen=True)
class Replay:
    """Means over the timed steps after the warm-up; seconds of a step by part, summed over layers."""

    steps: int
    hit_rate: float  # of the uses of an expert by a layer in a step: it was on the device when the layer was routed
    fetches: float
    moves: float  # fetches apart
    host: float
    device: float  # with the link's part in it
    link: float
    waiting: float
    seconds: float  # of a step, waiting included
    tokens_per_second: float

    @property
    def copies(self) -> float:
        return self.fetches + self.moves


@dataclass
class _Link:
    """Moves in flight, and the seconds that the link has spent on the oldest of them."""

    moves: int = 0
    spent: float = 0.0

    def late(self, free: float, copy: float) -> int:
        """How many moves are still in flight after a step that left the link free for that long."""
        landed = int(min(self.moves, (self.spent + free) / copy))
        self.moves -= landed
        self.spent = self.spent + free - landed * copy if self.moves else 0.0
        return self.moves


def replay(steps: Steps, planner: Planner, costs: Costs, warm_up: int = 0) -> Replay:
    """Raises ValueError when no timed step is left after `warm_up` steps."""
    timed = steps.timed
    timed[:warm_up] = False
    if not timed.any():
        raise ValueError(f"the trace has no decode step without prefill after its first {warm_up} steps")
    totals = np.zeros(9)  # hits, uses, and Replay's fields from fetches to seconds
    link = _Link()
    for step, (decode, prefill) in enumerate(steps):
        resident, fetched = np.zeros((2, *decode.shape), dtype=bool)
        only_decode = step not in steps.prefill
        for layer, tokens in enumerate(decode):
            resident[layer] = planner.slot_of[layer] >= 0
            if only_decode and planner.may_fetch(int(tokens.sum())):
                fetched[layer, [move.expert for move in planner.fetch(layer, tokens)]] = True
        cost = costs.layers(decode, resident, fetched)
        busy, seconds = cost.link.sum(), cost.seconds.sum()
        late = link.late(seconds - busy if only_decode else np.inf, costs.copy) if link.moves else 0
        moves = planner.end_step(decode, prefill, late)
        at_once = sum(bool(planner.slot_of[move.layer, move.expert] == move.slot) for move in moves)
        link.moves += len(moves) - at_once
        if step < warm_up:
            continue
        waiting = at_once * costs.copy
        totals += [0, 0, 0, len(moves), 0, 0, 0, waiting, waiting]
        if timed[step]:
            used = decode > 0
            totals[:3] += (used & resident).sum(), used.sum(), fetched.sum()
            totals[4:7] += cost.host.sum(), cost.device.sum(), busy
            totals[8] += seconds
    count = int(timed.sum())
    names = ("fetches", "moves", "host", "device", "link", "waiting", "seconds")
    means = dict(zip(names, (totals[2:] / count).tolist(), strict=True))
    speed = float(steps.rows[timed].sum() / totals[8])
    return Replay(steps=count, hit_rate=float(totals[0] / totals[1]), tokens_per_second=speed, **means)
