"""Drafts against a slow direct computation, and the counting on cases with known answers."""

import math

import pytest
import torch
from oracle import random_ids
from tiny import tiny_checkpoint

from hetero_glm5.core import UserError
from hetero_glm5.model.state import Cache, Rows, Segment
from hetero_glm5.quality.drafting import Acceptance, Drafter, count_accepted, run_lengths

LENGTH, FIRST, DEPTH = 40, 30, 3  # longer than index_topk 16: the MTP layer's own indexer chooses


@pytest.fixture(scope="module")
def drafter(checkpoints):
    with Drafter(str(tiny_checkpoint(checkpoints)), dtype=torch.float32, method="FP32") as drafter:
        yield drafter


def slowly(drafter: Drafter, known: list[int], depth: int) -> list[int]:
    """As a server would draft after `known`: everything anew, one MTP row after the other in one cache."""
    hidden, drafts = None, []
    cache = Cache.allocate(drafter.config, len(known) + depth, dtype="float32", device="cpu", mtp=True)

    def row(position: int, token: int) -> Rows:
        at = torch.tensor([position])
        return Rows(torch.tensor([token]), at, at, [Segment(0, 1, torch.arange(position + 1))])

    states = [drafter.model.forward(row(i, token), cache, drafter.experts) for i, token in enumerate(known[:-1])]
    for i, state in enumerate(states):
        hidden = drafter.mtp.forward(state, row(i, known[i + 1]), cache, drafter.experts)
    drafts.append(drafter.model.logits(hidden).argmax(-1).item())
    for step in range(1, depth):
        hidden = drafter.mtp.forward(hidden, row(len(known) - 2 + step, drafts[-1]), cache, drafter.experts)
        drafts.append(drafter.model.logits(hidden).argmax(-1).item())
    return drafts


@torch.inference_mode()
def test_drafts_are_those_of_a_server_at_every_place(drafter):
    ids = random_ids(LENGTH)
    got = drafter.drafts(ids, FIRST, DEPTH).tolist()
    assert got == [slowly(drafter, ids[: FIRST + j + 1], DEPTH) for j in range(LENGTH - FIRST - 1)]
    assert len({tuple(row) for row in got}) > 1, "drafts that are all alike cannot tell places apart"


def test_texts_that_follow_the_drafts_are_accepted(drafter):
    """A text that ends with what is drafted has a run of one there; a text of one token has no place."""
    ids = random_ids(20)
    drafts = drafter.drafts([*ids, 0], 19, 1).tolist()[-1]
    assert drafter.runs([(ids + drafts, 19), (ids[:5], 4), (ids[:5], 5)], 1) == [[1]]


def test_run_lengths():
    drafts = torch.tensor([[1, 2, 3], [9, 3, 4], [3, 9, 5], [4, 5, 6]])
    assert run_lengths(drafts, [1, 2, 3, 4]) == [3, 0, 1, 1]


def test_counting():
    """Five tokens to come: 2 right of up to 5, 0, 1, 2 of 2, 0."""
    found = count_accepted([[2, 0, 1, 2, 0]], depth=3)
    assert found.places == [5, 4, 3] and found.accepted == [3, 2, 0]
    # One drafted: pass 1 gives tokens 0 and 1, pass 2 gives 2 and 3, pass 3 the last. Two: 0-2, 3-4.
    assert found.tokens_per_step == [5 / 3, 5 / 2, 5 / 2]
    assert found.shares == [0.6, 0.5, 0.0]


def test_counting_over_several_texts_and_none():
    assert count_accepted([[1, 0], [0]], depth=1) == Acceptance([3], [1], [3 / 2])
    empty = count_accepted([], depth=1)
    assert empty.places == [0] and math.isnan(empty.shares[0]) and math.isnan(empty.tokens_per_step[0])


def test_a_model_without_the_layer_is_told(checkpoints):
    with pytest.raises(UserError, match="has no MTP layer"):
        Drafter(str(tiny_checkpoint(checkpoints, num_nextn_predict_layers=0)))
