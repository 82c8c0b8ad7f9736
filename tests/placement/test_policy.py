import numpy as np
import pytest

from hetero_glm5.placement import policy

STRATEGIES = ("uniform", "front-loading", "random", "frequency")
COUNTS = np.random.default_rng(0).integers(0, 50, (6, 8)).astype(float)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("budget", [0, 1, 7, 24, 48])
def test_every_strategy_spends_its_budget(strategy, budget):
    chosen = policy.place(strategy, 6, 8, budget, COUNTS)
    assert chosen.shape == (6, 8) and chosen.dtype == bool and chosen.sum() == budget
    assert np.array_equal(chosen, policy.place(strategy, 6, 8, budget, COUNTS))


def test_uniform_gives_layers_the_same_and_front_loading_fills_them():
    assert policy.uniform(4, 8, 10).sum(1).tolist() == [3, 3, 2, 2]
    assert policy.front_loading(4, 8, 10).sum(1).tolist() == [8, 2, 0, 0]
    assert policy.uniform(0, 8, 0).shape == (0, 8), "a model without MoE layers"
    assert len(set(policy.random(40, 8, 160).sum(1).tolist())) > 1


def test_frequency_takes_the_most_counted():
    chosen = policy.frequency(COUNTS, 10)
    assert COUNTS[chosen].min() >= COUNTS[~chosen].max()
    with pytest.raises(ValueError, match="counts"):
        policy.place("frequency", 6, 8, 3)


def test_slots_number_the_chosen_experts():
    chosen = np.array([[True, False, True], [False, False, True]])
    assert policy.slots(chosen).tolist() == [[0, -1, 1], [-1, -1, 2]]
