"""The chosen depth on machines and texts that are simulated."""

import itertools
import random

import pytest

from hetero_glm5.engine.draft_depth import DraftDepth


def play(depth: DraftDepth, accept: float, cost, draft: float, sequences=1, steps=1500) -> list[int]:
    """A step of R rows takes cost(R), each draft `draft`, with noise upwards; a draft is right with chance `accept`."""
    rng = random.Random(0)
    chosen = []
    for _ in range(steps):
        chosen.append(depth.choose(sequences))
        late = 1 + rng.random() ** 8 * 3
        if chosen[-1]:
            depth.drafted(sequences, chosen[-1], chosen[-1] * draft * late)
        depth.stepped(sequences * (1 + chosen[-1]), cost(sequences * (1 + chosen[-1])) * late)
        for _ in range(sequences):
            right = next((i for i in range(chosen[-1]) if rng.random() >= accept), chosen[-1])
            depth.verified(chosen[-1], right)
    return chosen


@pytest.mark.parametrize("sequences", [1, 4])
def test_right_drafts_that_cost_little_are_made(sequences):
    chosen = play(DraftDepth(3), 0.95, lambda rows: 1 + 0.05 * rows, 0.05, sequences)
    assert chosen[300:].count(3) > 0.9 * len(chosen[300:])


@pytest.mark.parametrize(("accept", "slope"), [(0.0, 0.05), (0.5, 1.0)])
def test_what_does_not_pay_is_hardly_tried(accept, slope):
    """Wrong drafts; or a machine on which a further row costs what a step does."""
    chosen = play(DraftDepth(4), accept, lambda rows: slope * rows + 0.1, 0.1)
    assert sum(chosen[900:]) < 0.03 * len(chosen[900:])


@pytest.mark.parametrize(("sequences", "accept", "best"), [(1, 0.95, 4), (4, 0.95, 4), (4, 0.1, 0)])
def test_the_machines_pace_changes(sequences, accept, best):
    """Twice as slow half of the time: that is no reason to draft more or less."""
    pace = itertools.cycle([1.0] * 90 + [2.0] * 90)
    chosen = play(DraftDepth(4), accept, lambda rows: next(pace) * (1 + 0.1 * rows), 0.05, sequences, steps=3000)
    assert chosen[600:].count(best) > 0.9 * len(chosen[600:])


def test_the_text_changes():
    depth = DraftDepth(3)
    play(depth, 0.95, lambda rows: 1 + 0.05 * rows, 0.05)
    assert play(depth, 0.0, lambda rows: 1 + 0.05 * rows, 0.05)[400:].count(0) > 800
    assert play(depth, 0.95, lambda rows: 1 + 0.05 * rows, 0.05, steps=8000)[-500:].count(3) > 400


def test_no_drafts_at_most_none():
    assert set(play(DraftDepth(0), 1.0, lambda rows: 1.0, 0.1, steps=50)) == {0}
