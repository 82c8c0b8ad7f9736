import numpy as np
import pytest

from hetero_glm5.placement.cost import Costs, Curve
from hetero_glm5.placement.planner import Move, Static
from hetero_glm5.placement.simulate import replay
from hetero_glm5.placement.trace import Steps

COSTS = Costs(1, Curve((1,), (1.0,)), Curve((1,), (0.25,)), link=1.0, host_call=0, device_call=0, copy_call=0)
SLOT_OF = np.array([[0, -1, -1], [-1, 1, -1]])


def steps(*uses, prefill=()):
    """Each of `uses`: the experts of layer 0 and of layer 1."""
    decode = np.zeros((len(uses), 2, 3), dtype=np.uint16)
    for step, layers in enumerate(uses):
        for layer, experts in enumerate(layers):
            decode[step, layer, list(experts)] = 1
    rows = np.array([bool(decode[step].any()) for step in range(len(uses))], dtype=np.int64)
    return Steps(decode, {step: np.ones((2, 3), dtype=np.uint16) for step in prefill}, rows)


def test_hits_and_times_of_a_static_placement():
    found = replay(steps(((0, 1), (2,)), ((0,), (1,)), ((), ()), prefill=[2]), Static(SLOT_OF), COSTS)
    assert (found.steps, found.hit_rate) == (2, 3 / 5)
    assert (found.host, found.device, found.seconds) == pytest.approx((2 / 2, 0.75 / 2, (1 + 1 + 0.25 + 0.25) / 2))
    assert found.tokens_per_second == pytest.approx(2 / 2.5) and found.copies == found.waiting == 0


def test_the_warm_up_is_not_counted():
    uses = ((0,), (1,)), ((1,), (0,))
    assert replay(steps(*uses), Static(SLOT_OF), COSTS, 1).hit_rate == 0
    with pytest.raises(ValueError, match="no decode step without prefill after its first 2 steps"):
        replay(steps(*uses), Static(SLOT_OF), COSTS, 2)


class Scripted(Static):
    """Orders three moves after the first step; records what it is told is late."""

    def __init__(self, at_once):
        super().__init__(SLOT_OF)
        self.at_once, self.late = at_once, []

    def end_step(self, decode, prefill, late=0):
        self.late.append(late)
        if len(self.late) > 1:
            return []
        if self.at_once:
            self.slot_of[0, 1] = 5
        return [Move(0, 1, 5)] * 3


def test_moves_land_when_the_link_was_free_for_them():
    step = ((1, 2), (0,))  # 2 + 1 seconds on the host: three copies of a second
    short = ((1,), ())
    planner = Scripted(at_once=False)
    found = replay(steps(short, short, short, step, step), planner, COSTS)
    assert planner.late == [0, 2, 1, 0, 0] and found.waiting == 0
    planner = Scripted(at_once=False)
    replay(steps(short, short, ((), ()), step, prefill=[2]), planner, COSTS)
    assert planner.late == [0, 2, 0, 0], "a prefill takes long"


def test_a_step_waits_for_moves_that_are_used_at_once():
    planner = Scripted(at_once=True)
    found = replay(steps(((0,), (1,)), ((0,), (1,))), planner, COSTS)
    assert planner.late == [0, 0] and found.waiting == 3 / 2 and found.seconds == pytest.approx(3 / 2 + 0.5)
