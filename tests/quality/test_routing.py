"""What is recorded, and the arithmetic on it."""

import math

import numpy as np
import pytest
import torch
from oracle import random_ids
from tiny import tiny_checkpoint

from hetero_glm5.core import no_clock
from hetero_glm5.llm import LLM
from hetero_glm5.quality.routing import SHARES, describe, entropy, recording


def test_entropy_in_bits():
    assert entropy(np.array([5, 5, 5, 5])) == 2 and entropy(np.array([7, 0, 0])) == 0
    assert entropy(np.array([2, 1, 1, 0])) == pytest.approx(1.5)


def test_description():
    """20 experts; in layer 0 expert e is chosen e times, in layer 1 always expert 7."""
    chosen = np.repeat(np.arange(20), np.arange(20))
    ids = np.stack([chosen, np.full_like(chosen, 7)], 1)[:, :, None]  # [190, 2, 1]
    found = describe(ids, 20)
    p = np.arange(1, 20) / 190
    assert found.selections == 190 and found.experts == 20
    assert found.entropy == [pytest.approx(-(p * np.log2(p)).sum()), 0.0]
    tops = [19, 19 + 18, sum(range(16, 20)), sum(range(10, 20))]
    assert [share[0] for share in found.shares] == [pytest.approx(n / 190) for n in tops]
    assert [share[1] for share in found.shares] == [1.0] * len(SHARES)
    assert describe(np.zeros((3, 1, 1), dtype=int), 4).shares[0] == [1.0]  # at least one expert


def test_everything_computed_is_recorded_and_nothing_changes(checkpoints):
    ids = random_ids(30)
    with LLM(tiny_checkpoint(checkpoints), device="cpu", skip_tokenizer=True, chunked_prefill_size=7) as llm:
        before, experts = llm.logits(ids), llm.engine.runner.experts
        with recording(llm) as recorder:
            assert torch.equal(llm.logits(ids), before)
            seen = recorder.take()
        assert llm.engine.runner.experts is experts
    assert seen.shape == (30, 3, 4) and seen.min() >= 0 and seen.max() < 16
    assert all(len(set(row)) == 4 for layer in seen.transpose(1, 0, 2) for row in layer.tolist())
    assert math.log2(16) > max(describe(seen, 16).entropy) > 2


def test_layers_keep_their_order(checkpoints):
    with LLM(tiny_checkpoint(checkpoints), device="cpu", skip_tokenizer=True) as llm, recording(llm) as recorder:
        recorder.experts = lambda *call: lambda: None
        for layer, expert in ((3, 1), (2, 0), (4, 2)):
            recorder(layer, torch.empty(2, 1), torch.full((2, 1), expert), torch.ones(2, 1), no_clock)
        assert recorder.take().tolist() == [[[0], [1], [2]]] * 2
