"""Deferral: which experts come when, and that it costs nothing once it is over."""

import pytest
import torch
from oracle import random_ids
from tiny import tiny_checkpoint

from hetero_glm5.core import no_clock
from hetero_glm5.llm import LLM
from hetero_glm5.quality.deferral import Deferred, deferring

IDS = torch.tensor([[0, 1, 2], [3, 4, 5]])
WEIGHTS = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])


def contributions(layer, x, ids, weights, clock):
    """y[t, e] = 100·layer·(weight of expert e): each layer's and expert's part can be told apart."""
    y = torch.zeros(len(ids), 6)
    used = ids >= 0
    y.scatter_add_(1, ids.clamp(min=0), torch.where(used, 100**layer * weights, 0.0))
    return lambda: y


def test_the_smallest_weights_come_one_layer_later_and_the_last_layer_defers_none():
    experts = Deferred(contributions, last_layer=2, count=1)
    x = torch.zeros(2, 6)
    for _ in range(2):  # a second pass starts anew
        first, second, last = (experts(layer, x, IDS, WEIGHTS, no_clock)() for layer in range(3))
        now = torch.tensor([[0.5, 0, 0.3, 0, 0, 0], [0, 0, 0, 0, 0.6, 0.3]])
        late = torch.tensor([[0, 0.2, 0, 0, 0, 0], [0, 0, 0, 0.1, 0, 0]])
        torch.testing.assert_close(first, now)
        torch.testing.assert_close(second, 100 * now + late)
        torch.testing.assert_close(last, 100**2 * (now + late) + 100 * late)


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
