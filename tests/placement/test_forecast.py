"""The forecast against routing whose future is known."""

import numpy as np
import pytest

from hetero_glm5.placement.forecast import HORIZON, Forecast

LAYERS, EXPERTS = 4, 64
NOTHING = np.zeros((LAYERS, EXPERTS), dtype=np.int64)


def forecast_of(steps):
    forecast = Forecast(LAYERS, EXPERTS)
    for step in steps:
        forecast.observe(step.astype(np.int64), NOTHING)
    return forecast


def test_stationary_routing_is_forecast_by_its_rates():
    rng = np.random.default_rng(0)
    rates = rng.beta(1, 8, (LAYERS, EXPERTS))
    expected = forecast_of(rng.random((1500, LAYERS, EXPERTS)) < rates).expected
    error = np.abs(expected - HORIZON * rates).mean()
    assert error < 0.15 * HORIZON * rates.mean()


def test_bursts_are_forecast_by_the_last_uses():
    """Each expert is used for 40 steps and then rests for a long time: all are used equally often."""
    rng = np.random.default_rng(1)
    start = rng.integers(0, 400, (LAYERS, EXPERTS))
    steps = [((step - start) % 400 < 40) & (rng.random((LAYERS, EXPERTS)) < 0.5) for step in range(1600)]
    forecast = forecast_of(steps)
    busy = (1599 - start) % 400 < 40 - HORIZON
    assert busy.sum() > 5
    assert forecast.expected[busy].mean() > 10 * abs(forecast.expected[~busy].mean())


@pytest.mark.parametrize("tells", [True, False])
def test_prompts_are_trusted_as_far_as_they_have_been_right(tells):
    """Each request's answer uses eight experts of a layer, which its prompt names, or all experts alike."""
    rng, forecast = np.random.default_rng(3), Forecast(LAYERS, EXPERTS)
    for _ in range(16):
        chosen = rng.permuted(np.arange(EXPERTS) < 8)
        rates = np.where(chosen, 0.5, 0.01) if tells else np.full(EXPERTS, 0.07)
        forecast.observe(NOTHING, 40 * chosen + NOTHING)
        after = forecast.expected.copy()
        for _ in range(40):
            forecast.observe((rng.random(NOTHING.shape) < rates).astype(np.int64), NOTHING)
    named, others = after[:, chosen].mean(), after[:, ~chosen].mean()
    assert named > 2 * others if tells else named < 1.5 * others


def test_the_same_counts_give_the_same_forecast():
    steps = np.random.default_rng(2).random((100, LAYERS, EXPERTS)) < 0.1
    assert np.array_equal(forecast_of(steps).expected, forecast_of(steps).expected)
