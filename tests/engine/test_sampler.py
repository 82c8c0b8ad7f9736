import math
from collections import Counter

import pytest
import torch

from hetero_glm5.core import Batch, Chunk, SamplingParams, Sequence
from hetero_glm5.engine.sampler import draw, sample, uniform
from hetero_glm5.engine.scheduler import INVALID_TOKEN

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0, 1.0])


def sequence(position=3, **params) -> Sequence:
    return Sequence([0] * position, SamplingParams(**params), 1)


def frequencies(draws=20_000, **params) -> list[float]:
    counts = Counter(draw(LOGITS, sequence(position=i + 1, seed=11, **params)) for i in range(draws))
    return [counts[i] / draws for i in range(len(LOGITS))]


def expected(temperature=1.0, top_k=0, top_p=1.0) -> list[float]:
    chances = [math.exp(v / temperature) for v in LOGITS.tolist()]
    order = sorted(range(len(chances)), key=lambda i: -chances[i])[: top_k or None]
    total = sum(chances[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass < top_p:
            kept.append(i)
        mass += chances[i] / total
    total = sum(chances[i] for i in kept)
    return [chances[i] / total if i in kept else 0.0 for i in range(len(chances))]


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.5}],
)
def test_draws_follow_the_distribution(params):
    for got, want in zip(frequencies(**params), expected(**params), strict=True):
        assert abs(got - want) < 4 * math.sqrt(0.25 / 20_000)
        assert want > 0 or got == 0


def test_extremes_leave_the_best_token():
    for params in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}, {"temperature": 1e-44}):
        assert {draw(LOGITS, sequence(i + 1, seed=3, **params)) for i in range(50)} == {1}


def test_a_draw_depends_on_seed_and_position_alone():
    a, b = sequence(9, seed=5), sequence(9, seed=5)
    assert uniform(a) == uniform(b) != uniform(sequence(10, seed=5)) != uniform(sequence(9, seed=6))
    assert uniform(sequence(9)) != uniform(sequence(9)), "without a seed, each sequence has its own"
    assert 0 <= uniform(sequence(9, seed=2**64 - 1)) < 1


def test_a_batch_mixes_rows_that_draw_and_rows_that_do_not():
    greedy, seeded, partial, broken = (
        sequence(4, temperature=0.0),
        sequence(5, seed=1),
        sequence(8, seed=1),
        sequence(6, seed=1),
    )
    chunks = [Chunk(greedy, 4), Chunk(partial, 3), Chunk(broken, 6), Chunk(seeded, 5)]
    logits = torch.stack([LOGITS, torch.full((6,), float("nan")), LOGITS])
    tokens = sample(logits, Batch(chunks))
    assert tokens == [1, None, INVALID_TOKEN, draw(LOGITS, seeded)]


@pytest.mark.parametrize("few", [1, 2, 6])
def test_a_few_candidates_are_enough_or_all_are_sorted(monkeypatch, few):
    monkeypatch.setattr("hetero_glm5.engine.sampler.FEW", few)
    seqs = [sequence(position=i + 1, seed=2, top_p=0.7) for i in range(200)]
    drawn = [draw(LOGITS, seq) for seq in seqs]
    monkeypatch.undo()
    assert drawn == [draw(LOGITS, seq) for seq in seqs] and len(set(drawn)) > 1


def test_before_min_tokens_no_end_token_is_drawn():
    for params in ({"temperature": 0.0}, {"seed": 1, "top_k": 2}):
        early, late, ignoring = (
            Sequence([0] * 3, SamplingParams(min_tokens=least, stop_token_ids=(3,), ignore_eos=ignore, **params), 1)
            for least, ignore in ((3, False), (2, False), (3, True))
        )
        batch = Batch([Chunk(seq, 3) for seq in (early, late, ignoring)])
        best = sample(torch.stack([LOGITS] * 3), batch, eos=(1,))
        assert best[0] in (5, 0), "neither eos 1 nor stop token 3"
        assert best[1] in (1, 3) and best[2] in (1, 5)
