"""Deferral changes what the model computes, and nothing once it is over."""

import pytest
import torch
from oracle import random_ids
from tiny import tiny_checkpoint

from hetero_glm5.llm import LLM
from hetero_glm5.quality.deferral import deferring


@pytest.mark.parametrize("on_device", [0, 5])
def test_it_changes_the_model_and_then_does_not(checkpoints, on_device):
    ids = random_ids(20)
    flags = {"device": "cpu", "dtype": "float32", "skip_tokenizer": True, "kt_num_gpu_experts": on_device}
    with LLM(tiny_checkpoint(checkpoints), **flags) as llm:
        before = llm.logits(ids)
        changes = []
        for count in (1, 4):
            with deferring(llm, count):
                changes.append((llm.logits(ids) - before).norm() / before.norm())
        assert 1e-3 < changes[0] < changes[1] and torch.equal(llm.logits(ids), before)
