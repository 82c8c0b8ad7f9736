"""Synthetic routing beside a profile of GLM-5.2: heat of 1,270 decoded tokens on 10 topics at 75 MoE layers, from
github.com/doramirdor/mbolt, results/colibri-119/coactivation_glm52_overlay.json (MIT license, (c) its authors)."""

import numpy as np
import pytest

from hetero_glm5.placement.synthetic import Conversations

ENTROPY = 7.419  # bits, the mean of the layers
TOP = {10: 0.172, 26: 0.330, 30: 0.362, 51: 0.504, 128: 0.824}  # uses of the so many most used experts of a layer
FIRST_LAYER = {10: 0.140, 26: 0.248, 128: 0.697}


@pytest.fixture(scope="module", params=[0.0, 1.0])
def steps(request):
    talk = Conversations(12, topic_tokens=127, recency=request.param, prompt=(1, 1), answer=(127, 127))
    return request.param, talk.steps(1280)


def test_shares_and_entropy_are_those_of_glm(steps):
    counts = np.sort(steps[1].decode.sum(0), axis=1)[:, ::-1] / 1.0
    shares = counts / counts.sum(1, keepdims=True)
    entropy = -(shares * np.log2(np.maximum(shares, 1e-12))).sum(1).mean()
    assert entropy == pytest.approx(ENTROPY, abs=0.12)
    for count, share in TOP.items():
        assert shares[:, :count].sum(1).mean() == pytest.approx(share, rel=0.08)
    for count, share in FIRST_LAYER.items():
        assert shares[0, :count].sum() == pytest.approx(share, rel=0.15)


def test_neighbours_share_experts_by_recency(steps):
    recency, found = steps
    used = found.decode[found.timed] > 0
    shared = (used[1:] & used[:-1]).sum() / used[1:].sum()
    assert shared == pytest.approx({0.0: 0.09, 1.0: 0.25}[recency], abs=0.03)


def test_every_token_has_k_experts_and_the_seed_decides():
    talk = Conversations(3, 32, 4, users=2, prompt=(5, 9), answer=(10, 20))
    steps, again, other = talk.steps(80), talk.steps(80), Conversations(**vars(talk) | {"seed": 1}).steps(80)
    assert (steps.decode.sum(2) == 4 * steps.rows[:, None]).all() and set(steps.rows.tolist()) == {0, 2}
    assert all(5 * 4 <= rows <= 9 * 4 for counts in steps.prefill.values() for rows in counts.sum(1))
    assert len(steps.prefill) > 4
    assert np.array_equal(steps.decode, again.decode) and not np.array_equal(steps.decode, other.decode)
