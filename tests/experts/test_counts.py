"""Counts against counting one by one, whatever the batch, and whenever they are taken."""

import numpy as np
import pytest
import torch

from hetero_glm5.experts.counts import RoutingCounts

LAYERS, EXPERTS, TOPK = 3, 7, 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def step(rng, rows):
    """(which rows are decoded, ids int64 [LAYERS, rows, TOPK]) with duplicates and -1."""
    return rng.random(rows) < 0.5, rng.integers(-1, EXPERTS, (LAYERS, rows, TOPK))


def counted(decode, ids):
    want = np.zeros((2, LAYERS, EXPERTS), dtype=np.int64)
    for (layer, row, _), expert in np.ndenumerate(ids):
        if expert >= 0:
            want[0 if decode[row] else 1, layer, expert] += 1
    return want


def count(counts, decode, ids):
    counts.begin(torch.from_numpy(decode))
    for layer in reversed(range(LAYERS)):
        counts.add(layer, torch.from_numpy(ids[layer]).to(counts.device))
    counts.drain()


@pytest.fixture(params=DEVICES)
def counts(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return RoutingCounts(LAYERS, EXPERTS, request.param)


@pytest.mark.parametrize("taken_after", [1, 2, 5])
def test_every_step_is_counted_exactly(counts, taken_after):
    rng = np.random.default_rng(0)
    wanted = []
    for number, rows in enumerate([1, 0, 33, 5, 400, 1, 0, 2, 17, 8]):
        decode, ids = step(rng, rows)
        with torch.inference_mode(mode=number % 2 == 0):
            count(counts, decode, ids)
        wanted.append(counted(decode, ids))
        if len(wanted) == taken_after:
            assert counts.pending == taken_after
            for want in wanted:
                got = counts.take()
                assert np.array_equal(got, want) and got[0].dtype == np.int64 and got[1].flags.c_contiguous
            wanted.clear()
    assert not wanted and counts.pending == 0


def test_what_is_taken_stays(counts):
    rng = np.random.default_rng(1)
    steps = [step(rng, 9) for _ in range(4)]
    taken = []
    for decode, ids in steps:
        count(counts, decode, ids)
        taken.append(counts.take())
    assert all(np.array_equal(got, counted(*one)) for got, one in zip(taken, steps, strict=True))


@pytest.mark.parametrize("decoded", [True, False])
def test_one_phase_does_not_reach_into_the_other(counts, decoded):
    """The halves of a counter, with far more selections than 16 bits hold."""
    rows = 100_000
    count(counts, np.full(rows, decoded), np.full((LAYERS, rows, TOPK), 2))
    decode, prefill = counts.take()
    busy, idle = (decode, prefill) if decoded else (prefill, decode)
    assert busy[:, 2].tolist() == [TOPK * rows] * LAYERS and busy.sum() == LAYERS * TOPK * rows
    assert not idle.any()


def test_a_step_that_failed_leaves_nothing_behind(counts):
    rng = np.random.default_rng(2)
    counts.begin(torch.ones(3, dtype=torch.bool))
    counts.add(0, torch.zeros(3, TOPK, dtype=torch.int64, device=counts.device))
    decode, ids = step(rng, 6)
    count(counts, decode, ids)
    assert np.array_equal(counts.take(), counted(decode, ids))


def test_rows_that_were_not_announced_are_refused(counts):
    counts.begin(torch.ones(3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="expand"):
        counts.add(0, torch.zeros(4, TOPK, dtype=torch.int64, device=counts.device))


def test_nothing_to_take(counts):
    with pytest.raises(IndexError):
        counts.take()
