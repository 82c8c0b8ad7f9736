"""The divider against every subset, through the pipeline as it runs; the threshold on the machines of the design."""

from itertools import permutations

import numpy as np
import pytest

from hetero_glm5.placement.cost import Costs, Curve
from hetero_glm5.placement.divide import CORE, GAIN, divide, threshold, undivided

WEIGHTS = 3 * 6144 * 2048  # of an expert
INT4, FP8, BF16 = 4.378, 8.003, 16.0  # bits of a weight
UNIFORM = np.full(256, 1 / 256)
TOP = np.interp(np.arange(257), [0, 10, 26, 30, 51, 128, 256], [0, 0.17, 0.33, 0.36, 0.50, 0.82, 1])
SKEWED = np.diff(TOP)  # what the most used experts of GLM-5.2 took of 1,270 tokens


def machine(bits: float, link: float, host: tuple[float, float], device: tuple[float, float], **calls) -> Costs:
    """host and device: bytes/s and FLOP/s."""
    return Costs(int(WEIGHTS * bits / 8), Curve.roofline(*host, bits), Curve.roofline(*device, bits), link, **calls)


def random_costs(rng: np.random.Generator, decades: float) -> Costs:
    """Rates up to so many decades off those of a workstation."""

    def near(value):
        return value * 10 ** rng.uniform(-decades, decades)

    bits = rng.choice([INT4, FP8, BF16])
    host, device = (near(250e9), near(8e12)), (near(1e12), near(150e12))
    return machine(bits, near(35e9), host, device, host_call=near(50e-6), device_call=near(20e-6))


def random_tokens(rng: np.random.Generator, experts: int) -> np.ndarray:
    total = 10 ** rng.uniform(0, 4.5)
    draws = (
        lambda: rng.poisson(total / experts * rng.gamma(1, 1, experts)),
        lambda: rng.multinomial(int(total), rng.dirichlet(np.full(experts, 0.3))),
        lambda: np.full(experts, int(total / experts) + 1),
        lambda: (10 ** rng.uniform(0, 4, experts)).astype(np.int64),
    )
    return draws[rng.integers(len(draws))]()


def pipeline(copy: float, computes: np.ndarray, start: float, head_start: float, chosen: np.ndarray) -> np.ndarray:
    """When the device is done, [sets]: computes [k] in order, chosen bool [sets, k]. Two slots: a copy begins when the
    last copy has ended and the compute before the last one has."""
    copied = np.full(len(chosen), -head_start)
    before, last = np.full((2, len(chosen)), -np.inf)  # when the two last computes end
    for compute, now in zip(computes, chosen.T, strict=True):
        arrival = np.maximum(copied, before) + copy
        ended = np.maximum(arrival, np.maximum(last, start)) + compute
        copied = np.where(now, arrival, copied)
        before, last = np.where(now, [last, ended], [before, last])
    return last


def sides(streamed: np.ndarray, tokens: np.ndarray, slot_of: np.ndarray, costs: Costs, head_start: float):
    """Of the sets `streamed` bool [sets, E], each copied in the order of falling tokens: host and device seconds."""
    on_host, on_device = costs.on_host(tokens), costs.on_device(tokens)
    host = (~streamed & (slot_of < 0)) * on_host
    host = np.where((host > 0).any(1), costs.host_call + host.sum(1), 0)
    start = costs.device_call + on_device[slot_of >= 0].sum()
    order = np.argsort(-on_device, kind="stable")
    device = pipeline(costs.copy, on_device[order], start, head_start, streamed[:, order])
    alone = start if (tokens[slot_of >= 0] > 0).any() else 0.0
    return host, np.where(streamed.any(1), device, alone)


def test_within_five_percent_of_the_best_subset():
    rng = np.random.default_rng(0)
    ratios, between = [], 0
    for i in range(1000):
        experts, residents = rng.integers(1, CORE + 3), rng.integers(0, 6)
        tokens = np.concatenate([random_tokens(rng, experts), random_tokens(rng, residents + 1)[:residents]])
        slot_of = np.r_[np.full(experts, -1), np.arange(residents)]
        costs = random_costs(rng, decades=3 if i % 2 else 0.5)
        head_start = costs.copy * rng.choice([0, rng.uniform(0, 3)])

        found = divide(tokens, slot_of, costs, head_start)
        mine = np.isin(np.arange(len(tokens)), found.streamed)[None]
        assert len(set(found.streamed)) == len(found.streamed) and (tokens[mine[0]] > 0).all()
        assert (np.diff(costs.on_device(tokens)[found.streamed]) <= 0).all(), "the longest compute first"
        predicted = [found.host_seconds, found.device_seconds]
        assert np.allclose(np.ravel(sides(mine, tokens, slot_of, costs, head_start)), predicted, rtol=1e-9)

        missing = np.flatnonzero((slot_of < 0) & (tokens > 0))
        subsets = np.zeros((1 << len(missing), len(tokens)), dtype=bool)
        subsets[:, missing] = np.arange(1 << len(missing))[:, None] >> np.arange(len(missing)) & 1
        times = np.maximum(*sides(subsets, tokens, slot_of, costs, head_start))
        assert found.seconds <= min(times[0], times[-1]) * (1 + 1e-9), "all on the host, all streamed"
        assert undivided(tokens, slot_of, costs).seconds == pytest.approx(times[0])
        ratios.append(found.seconds / times.min() if times.min() else 1.0)
        between += 0 < len(found.streamed) < len(missing)
    assert max(ratios) <= 1.05 and between > 300, "of which not all are trivial"


def test_no_other_order_is_better_by_a_copy():
    rng = np.random.default_rng(1)
    for _ in range(150):
        computes = np.sort(10 ** rng.uniform(-2.5, 1.5, rng.integers(1, 7)))[::-1]
        start, head_start = rng.choice([0, rng.uniform(0, 20)]), rng.choice([0, rng.uniform(0, 3)])
        every = np.ones((1, len(computes)), dtype=bool)
        ends = [pipeline(1.0, np.array(order), start, head_start, every)[0] for order in permutations(computes)]
        assert ends[0] <= min(ends) + 1


def bound(tokens: np.ndarray, slot_of: np.ndarray, costs: Costs) -> float:
    """No division is faster, but for calls and two copies: the best of many weightings of the two sides (Lagrange)."""
    missing, weight = slot_of < 0, np.linspace(0, 1, 1001)
    h, d = costs.on_host(tokens[missing]), np.maximum(costs.copy, costs.on_device(tokens[missing]))
    least = np.minimum(np.outer(1 - weight, h), np.outer(weight, d)).sum(1)
    return float((least + weight * costs.on_device(tokens[~missing]).sum()).max())


def test_large_layers_come_within_five_percent_of_a_bound():
    rng = np.random.default_rng(2)
    for i in range(60):
        costs = random_costs(rng, decades=1.5 if i % 2 else 0.5)
        shares, slot_of = rng.dirichlet(np.full(256, rng.choice([0.3, 1, 100]))), np.where(rng.random(256) < 0.1, 0, -1)
        tokens = rng.multinomial(8 * rng.integers(256, 16384), shares)
        fixed = costs.host_call + costs.device_call + 2 * costs.copy
        assert divide(tokens, slot_of, costs).seconds <= 1.05 * bound(tokens, slot_of, costs) + fixed


def test_what_has_nothing_to_stream():
    costs = machine(INT4, 50e9, (400e9, 10e12), (1.5e12, 150e12))
    for tokens, slot_of in (([0, 0], [-1, -1]), ([5, 0], [3, -1]), ([], [])):
        found = divide(np.array(tokens, dtype=np.int64), np.array(slot_of, dtype=np.int64), costs)
        assert found.streamed.size == 0 and found.host_seconds == 0 and (found.device_seconds > 0) == (5 in tokens)


SERVER = 50e9, (1.5e12, 150e12)  # RTX 5090, and 12 channels of DDR5 on AVX-512 or AMX
DESKTOP = 25e9, (0.8e12, 120e12)  # RTX 4090, and 4 channels


@pytest.mark.parametrize(
    ("gpu", "host", "bits", "uniform", "skewed"),
    [
        (SERVER, (400e9, 10e12), INT4, 470, 152),
        (SERVER, (400e9, 10e12), FP8, 861, 279),
        (SERVER, (400e9, 10e12), BF16, 1722, 558),
        (SERVER, (400e9, 25e12), INT4, 1218, 362),
        (SERVER, (400e9, 25e12), FP8, 2048, 664),
        (SERVER, (400e9, 25e12), BF16, 4096, 1328),
        (DESKTOP, (150e9, 1.5e12), INT4, 152, 35),
        (DESKTOP, (150e9, 1.5e12), FP8, 256, 83),
        (DESKTOP, (150e9, 1.5e12), BF16, 512, 166),
    ],
)
def test_thresholds(gpu, host, bits, uniform, skewed):
    link, device = gpu
    costs = machine(bits, link, host, device)
    assert (threshold(costs, 8, UNIFORM), threshold(costs, 8, SKEWED)) == (uniform, skewed)
    tokens, slot_of = np.full(256, uniform * 8 // 256), np.full(256, -1)
    for times in (1, 2, 8):
        ratio = undivided(times * tokens, slot_of, costs).seconds / divide(times * tokens, slot_of, costs).seconds
        assert ratio >= GAIN * (0.95 if times == 1 else 1)
    assert threshold(costs, 8, SKEWED, resident=0.2) > skewed, "residents are the experts that are worth a copy"


def test_no_threshold_where_the_link_is_of_no_use():
    assert threshold(machine(INT4, 1e9, (400e9, 100e12), (1.5e12, 150e12)), 8, UNIFORM) is None
    assert threshold(machine(INT4, 50e9, (400e9, 10e12), (1.5e12, 150e12)), 8, UNIFORM, resident=1.0) is None
