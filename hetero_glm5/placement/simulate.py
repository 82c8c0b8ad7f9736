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


def replay(steps: Steps, planner: Planner, costs: Costs, warm_up: int = 0) -> Replay:
    """Raises ValueError when no timed step is left after `warm_up` steps."""
    timed = steps.timed
    timed[:warm_up] = False
    if not timed.any():
        raise ValueError(f"the trace has no decode step without prefill after its first {warm_up} steps")
    totals = np.zeros(9)  # hits, uses, fetches, moves, host, device, link, waiting, seconds
    in_flight, since = 0, 0.0  # moves, and seconds of their link time already spent
    for step, (decode, prefill) in enumerate(steps):
        resident, fetched = np.empty(decode.shape, dtype=bool), np.zeros(decode.shape, dtype=bool)
        only_decode = step not in steps.prefill
        for layer, tokens in enumerate(decode):
            resident[layer] = planner.slot_of[layer] >= 0
            if only_decode:
                for move in planner.fetch(layer, tokens):
                    fetched[layer, move.expert] = True
        cost = costs.layers(decode, resident, fetched)
        link = cost.link.sum()
        if only_decode:
            since += cost.seconds.sum() - link
        landed = min(in_flight, int(since / costs.copy)) if only_decode else in_flight
        since = since - landed * costs.copy if in_flight > landed else 0.0
        moves = planner.end_step(decode, prefill, in_flight - landed)
        in_flight -= landed
        stopped = sum(planner.slot_of[move.layer, move.expert] == move.slot for move in moves)
        in_flight += len(moves) - stopped
        counted = float(timed[step])
        waiting = stopped * costs.copy * (step >= warm_up)
        uses = decode > 0
        totals += counted * np.array(
            [
                (uses & resident).sum(),
                uses.sum(),
                fetched.sum(),
                0.0,
                cost.host.sum(),
                cost.device.sum(),
                link,
                0.0,
                cost.seconds.sum(),
            ]
        )
        totals[[3, 7, 8]] += np.array([len(moves) * (step >= warm_up), waiting, waiting])
    hits, uses = totals[:2]
    means = totals[2:] / timed.sum()
    tokens = steps.rows[timed].sum()
    return Replay(int(timed.sum()), hits / uses, *means.tolist(), tokens / totals[8])
