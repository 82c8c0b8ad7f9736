"""What every planner owes its caller, and what Adaptive decides."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from hetero_glm5.placement.baselines import LFU, LRU, KTDynamic
from hetero_glm5.placement.comparison import MACHINES
from hetero_glm5.placement.cost import Costs, Curve
from hetero_glm5.placement.planner import Adaptive, Move, Static, fetch_count
from hetero_glm5.placement.policy import slots, uniform

LAYERS, EXPERTS, K = 5, 24, 4
COSTS = replace(MACHINES["rtx5090"], layer=2e-3)
FAST_LINK = replace(COSTS, link=1e12)
START = slots(uniform(LAYERS, EXPERTS, 30))
PLANNERS = {
    "static": lambda: Static(START),
    "adaptive": lambda: Adaptive(START, COSTS),
    "adaptive, fast link": lambda: Adaptive(START, FAST_LINK),
    "LRU": lambda: LRU(START),
    "LFU": lambda: LFU(START),
    "kt-dynamic": lambda: KTDynamic(START, 16, K),
}


def routed(rng, rows):
    popular = np.linspace(0, 3, EXPERTS)
    tokens = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    for layer, _ in product(range(LAYERS), range(rows)):
        tokens[layer, np.argsort(popular + rng.gumbel(size=EXPERTS))[-K:]] += 1
    return tokens


@pytest.mark.parametrize("name", PLANNERS)
def test_an_expert_is_used_only_where_it_is(name):
    """Replays the copies on slots of its own: whatever slot_of says is what was copied there last, and has landed."""
    rng, planner = np.random.default_rng(3), PLANNERS[name]()
    holds = {int(slot): (layer, e) for (layer, e), slot in np.ndenumerate(START) if slot >= 0}
    in_flight, moved = [], 0
    for step in range(150):
        prefill = routed(rng, 20 if step % 30 == 7 else 0)
        decode = routed(rng, 0 if prefill.any() else 2)
        for layer in range(LAYERS):
            for move in planner.fetch(layer, decode[layer]):
                assert planner.may_fetch(int(decode[layer].sum()))
                assert decode[layer, move.expert] and move.slot not in {m.slot for m in in_flight}
                assert planner.slot_of[layer, move.expert] == move.slot
                holds[move.slot] = layer, move.expert
        late = int(rng.integers(0, len(in_flight) + 1))
        for move in in_flight[: len(in_flight) - late]:
            holds[move.slot] = move.layer, move.expert
        in_flight = in_flight[len(in_flight) - late :]
        moves = planner.end_step(decode, prefill, late)
        moved += len(moves)
        if name == "kt-dynamic":
            holds |= {move.slot: (move.layer, move.expert) for move in moves}
        else:
            in_flight += moves
        held = {(int(a), int(b)): int(planner.slot_of[a, b]) for a, b in np.argwhere(planner.slot_of >= 0)}
        assert len(set(held.values())) == len(held)
        assert not set(held.values()) & {move.slot for move in in_flight}
        assert all(holds[slot] == expert for expert, slot in held.items())
    changed = (planner.slot_of != START).any()
    assert changed == (name != "static") and (moved > 0) == (name not in ("static", "LRU", "LFU"))


def test_moves_hide_behind_a_step():
    rng, planner = np.random.default_rng(4), Adaptive(START, COSTS)
    most = 0
    for _ in range(100):
        decode = routed(rng, 1)
        cost = COSTS.layers(decode, planner.slot_of >= 0, np.zeros_like(decode, dtype=bool))
        moves = planner.end_step(decode, np.zeros_like(decode))
        assert len(moves) * COSTS.copy <= cost.seconds.sum()
        most = max(most, len(moves))
    assert most > 1


def test_a_dropped_move_frees_its_slot_for_another():
    rng, planner = np.random.default_rng(5), Adaptive(START, COSTS)
    nothing = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    moves: list[Move] = []
    while not moves:
        moves = planner.end_step(routed(rng, 1), nothing)
    planner.drop(moves[0])
    again = planner.end_step(routed(rng, 1), nothing)
    assert planner.slot_of[moves[0].layer, moves[0].expert] == -1
    assert again[0].slot == moves[0].slot


def test_popular_experts_come_and_stay():
    rng, planner = np.random.default_rng(6), Adaptive(START, COSTS)
    copies = []
    for _ in range(600):
        copies.append(len(planner.end_step(routed(rng, 1), np.zeros((LAYERS, EXPERTS), dtype=np.int64))))
    popular = planner.slot_of[:, -6:] >= 0
    assert popular.mean() > 0.8 and sum(copies[-100:]) < sum(copies[:100]) / 2


@pytest.mark.parametrize("link", [5e9, 50e9, 500e9])
def test_fetch_count_is_the_best_there_is(link):
    rng = np.random.default_rng(7)
    host = Curve((1, 4, 64), (2.5e-12, 3e-12, 30e-12))
    device = Curve((1, 64), (0.6e-12, 1e-12))
    costs = Costs(20 << 20, host, device, link)
    found = set()
    for _ in range(300):
        hits, misses = rng.integers(1, 9, rng.integers(0, 9)), rng.integers(1, 9, rng.integers(0, 60))
        tokens = np.concatenate((hits, misses))[None]
        resident = np.arange(tokens.size)[None] < len(hits)

        def seconds(count, tokens=tokens, resident=resident, hits=hits):
            fetched = ~resident & (np.arange(tokens.size)[None] < len(hits) + count)
            return costs.layers(tokens, resident, fetched).seconds.sum()

        count = fetch_count(costs, hits, misses)
        best = min(map(seconds, range(len(misses) + 1)))
        assert seconds(count) <= best * (1 + 1e-9)
        assert count == 0 or seconds(count - 1) > seconds(count)
        found.add(count)
    assert found - {0}
