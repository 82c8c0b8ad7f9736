"""The other planners against what defines them."""

from collections import OrderedDict
from itertools import combinations

import numpy as np
import pytest

from hetero_glm5.placement.baselines import LFU, LRU, Belady, KTDynamic, most_hits
from hetero_glm5.placement.comparison import MACHINES
from hetero_glm5.placement.policy import slots, uniform
from hetero_glm5.placement.simulate import replay
from hetero_glm5.placement.synthetic import Conversations
from hetero_glm5.placement.trace import Steps

COSTS = MACHINES["rtx5090"]
SMALL = Conversations(3, 16, 2, prompt=(4, 8), answer=(20, 40))


def one_layer(uses, experts):
    decode = np.zeros((len(uses), 1, experts), dtype=np.uint16)
    decode[np.arange(len(uses)), 0, uses] = 1
    return Steps(decode, {}, np.ones(len(uses), dtype=np.int64))


def test_lru_is_lru():
    uses = np.random.default_rng(0).zipf(1.5, 400) % 9
    cache = OrderedDict.fromkeys(range(3))
    hits = 0
    for expert in uses.tolist():
        hits += expert in cache
        cache[expert] = None
        cache.move_to_end(expert)
        if len(cache) > 3:
            cache.popitem(last=False)
    assert 0 < hits < 400
    assert replay(one_layer(uses, 9), LRU(slots(uniform(1, 9, 3))), COSTS).hit_rate == hits / 400


def test_lfu_keeps_the_most_used():
    planner = LFU(slots(uniform(1, 6, 2)))
    for expert in (4, 4, 4, 5, 5, 0, 1, 2):
        planner.fetch(0, np.eye(6, dtype=np.int64)[expert])
    assert np.flatnonzero(planner.slot_of[0] >= 0).tolist() == [2, 4], "4 stays; the last use always comes in"


@pytest.mark.parametrize("seed", range(4))
def test_belady_is_the_optimum(seed):
    """Over all sets of experts that could be held at each step, of those that bring in only what is missed."""
    uses = np.random.default_rng(seed).integers(0, 5, 24)
    sets = [frozenset(held) for held in combinations(range(5), 2)]
    best = {held: 0 if held == {0, 1} else -99 for held in sets}
    for expert in uses.tolist():
        best = {
            held: max(
                best[before] + (expert in before)
                for before in sets
                if held == before or (expert not in before and held - before == {expert})
            )
            for held in sets
        }
    planner = Belady(slots(uniform(1, 5, 2)), one_layer(uses, 5))
    assert replay(one_layer(uses, 5), planner, COSTS).hit_rate * 24 == pytest.approx(max(best.values()))


@pytest.mark.parametrize("seed", range(4))
def test_most_hits_bounds_every_cache_and_is_near_belady(seed):
    steps = Conversations(**vars(SMALL) | {"seed": seed}).steps(200)
    start = slots(uniform(3, 16, 12))
    found = {cls: replay(steps, cls(start), COSTS, 50) for cls in (LRU, LFU)}
    best = found[Belady] = replay(steps, Belady(start, steps), COSTS, 50)
    for replayed in found.values():
        fetches = round(replayed.copies * replayed.steps)
        assert replayed.hit_rate <= best.hit_rate + 0.01
        assert replayed.hit_rate <= most_hits(steps, 12, fetches, 50)
    fetches = round(best.copies * best.steps)
    bound = most_hits(steps, 12, fetches, 50)
    assert best.hit_rate <= bound <= 1.06 * best.hit_rate
    assert most_hits(steps, 12, fetches // 4, 50) < 0.97 * bound


def test_kt_dynamic_forgets_all_but_the_last_long_prefill():
    planner = KTDynamic(slots(uniform(2, 8, 4)), threshold=10, top_k=2)
    nothing = np.zeros((2, 8), dtype=np.int64)
    first, second = np.arange(8) * np.ones((2, 1), dtype=np.int64), np.arange(8)[::-1] * np.ones((2, 1), dtype=np.int64)
    assert not planner.end_step(nothing, first // 4), "a short prefill changes nothing"
    for counts, chosen in ((first, [6, 7]), (second, [0, 1]), (second, [0, 1])):
        moves = planner.end_step(nothing, counts)
        assert len(moves) == 4, "residents are copied again"
        assert [np.flatnonzero(row >= 0).tolist() for row in planner.slot_of] == [chosen, chosen]
