"""The forecast against routing whose future is known."""

import numpy as np

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


def test_a_prompt_counts_as_so_many_tokens():
    forecast = Forecast(LAYERS, EXPERTS)
    first = np.where(np.arange(EXPERTS) < 8, 1, 0) * np.ones((LAYERS, 1), dtype=np.int64)
    for _ in range(64):
        forecast.observe(first, NOTHING)
    forecast.observe(NOTHING, 300 * first[:, ::-1])
    assert (forecast.expected[:, -8:] > 2 * forecast.expected[:, :8]).all()


def test_the_same_counts_give_the_same_forecast():
    steps = np.random.default_rng(2).random((100, LAYERS, EXPERTS)) < 0.1
    assert np.array_equal(forecast_of(steps).expected, forecast_of(steps).expected)
