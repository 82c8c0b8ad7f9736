from pathlib import Path

import numpy as np
import pytest

from hetero_glm5.placement.comparison import MACHINES, PLANNERS, Case
from hetero_glm5.placement.synthetic import Conversations
from hetero_glm5.placement.trace import Steps, Trace

DEMO_TRACE = Path(__file__).with_name("data") / "demo.trace"  # hetero-glm5 trace record, 40 requests
TALK = Conversations(6, 96, 4, prompt=(256, 300), answer=(80, 160))


@pytest.fixture(scope="module")
def found():
    """Every policy with a tenth, and with half of the experts on the device, where topics change."""
    case = Case(TALK.steps(700), MACHINES["rtx5090"], TALK.top_k, 200)
    return {share: {name: case.run(name, share) for name in PLANNERS} for share in (0.1, 0.5)}


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_adaptive_beats_what_does_not_see_the_future(found, share):
    rates = {name: replayed.hit_rate for name, replayed in found[share].items()}
    best = rates.pop("Belady"), rates.pop("adaptive")
    assert best[0] > best[1] >= max(rates.values()), rates
    adaptive = found[share]["adaptive"]
    assert adaptive.copies < found[share]["LRU"].copies and adaptive.waiting == 0
    assert adaptive.tokens_per_second == max(replayed.tokens_per_second for replayed in found[share].values())


def test_adaptive_finds_small_lasting_differences():
    """Half of the experts fit, so those at the edge are used about as often as each other; nothing is recent."""
    talk = Conversations(6, 96, 4, recency=0.0, prompt=(256, 300), answer=(80, 160))
    case = Case(talk.steps(700), MACHINES["rtx5090"], talk.top_k, 300)
    found = {name: case.run(name, 0.5) for name in ("frequency", "LRU", "adaptive")}
    rates = {name: replayed.hit_rate for name, replayed in found.items()}
    assert rates["adaptive"] > rates["LRU"] + 0.05 and rates["adaptive"] > rates["frequency"] - 0.01
    assert found["adaptive"].copies < found["LRU"].copies / 4


def test_kt_dynamic_stops_the_world(found):
    assert found[0.5]["kt-dynamic"].waiting > 0 and found[0.5]["kt-dynamic"].hit_rate > found[0.5]["uniform"].hit_rate


def test_every_policy_starts_with_the_budget():
    case = Case(TALK.steps(20), MACHINES["rtx4090"], TALK.top_k)
    assert all((case.planner(name, 0.3).slot_of >= 0).sum() == 173 == case.budget(0.3) for name in PLANNERS)
    assert len({np.sort(case.planner(name, 0.3).slot_of, None).tobytes() for name in PLANNERS}) == 1


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_demo_models_own_routing(share):
    """Which hardly drifts: a static choice that has seen the trace is hard to beat, and caches churn."""
    steps = Steps.of(Trace.load(DEMO_TRACE))
    case = Case(steps, MACHINES["rtx4090"], 4, len(steps) // 5)
    found = {name: case.run(name, share) for name in ("uniform", "frequency", "kt-dynamic", "LRU", "LFU", "adaptive")}
    rates = {name: replayed.hit_rate for name, replayed in found.items()}
    seen = rates.pop("frequency")
    assert rates["adaptive"] == max(rates.values()) and rates["adaptive"] > 0.9 * seen, (seen, rates)
    assert found["adaptive"].copies < found["LRU"].copies / 4
