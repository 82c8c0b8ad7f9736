import hashlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_glm5.core import Batch, Chunk, Drawn, RequestError, SamplingParams, Sequence
from hetero_glm5.engine import sampler
from hetero_glm5.engine.sampler import Sampler, prompt_logprobs, uniform
from hetero_glm5.engine.scheduler import INVALID_TOKEN

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0, 1.0])
VOCAB = len(LOGITS)
NAN = float("nan")


def sequence(tokens=(0, 0, 0), prompt=1, **params) -> Sequence:
    return Sequence(list(tokens), SamplingParams(**params), prompt)


def chunk(seq, drafts=()) -> Chunk:
    return Chunk(seq, seq.num_pending, drafts)


def sample(logits, chunks, eos=()) -> list[list[Drawn]]:
    made = Sampler(eos, None, logits.shape[-1])
    for one in chunks:
        made.prepare(one.seq)
    return made(logits.clone(), Batch(chunks))


def tokens(drawn: list[list[Drawn]]) -> list[list[int]]:
    return [[one.token for one in each] for each in drawn]


def reference(logits, tokens, prompt, params) -> list[float]:
    """The chance of each token, in Python floats."""
    out = tokens[prompt:]
    x = logits.tolist()
    for i in set(tokens):
        x[i] = x[i] / params.repetition_penalty if x[i] > 0 else x[i] * params.repetition_penalty
    for i in set(out):
        x[i] -= params.frequency_penalty * out.count(i) + params.presence_penalty
    for i, bias in params.logit_bias.items():
        x[i] += bias
    chances = [math.exp((v - max(x)) / params.temperature) for v in x]
    kept = [i for i in range(len(x)) if chances[i] >= params.min_p]
    kept = sorted(kept, key=lambda i: -chances[i])[: params.top_k or None]
    total, before, nucleus = sum(chances[i] for i in kept), 0.0, []
    for i in kept:
        if before < params.top_p * total:
            nucleus.append(i)
        before += chances[i]
    total = sum(chances[i] for i in nucleus)
    return [chances[i] / total if i in nucleus else 0.0 for i in range(len(x))]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.7},
        {"top_k": 4, "top_p": 0.5},
        {"min_p": 0.3},
        {"min_p": 0.2, "temperature": 3.0, "top_k": 5, "top_p": 0.9},
        {"min_p": 1.0, "top_p": 0.9},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5, "presence_penalty": 1.5, "top_p": 0.8},
        {"frequency_penalty": -0.8},
        {"frequency_penalty": 1.1, "logit_bias": {1: -100, 2: 3.5}},
    ],
)
def test_each_method_draws_from_its_distribution(params, monkeypatch):
    n = 1000
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: (seed + 0.5) / n)
    seqs = [sequence((2, 3, 1, 3, 3, 0), prompt=2, seed=i, **params) for i in range(n)]
    drawn = [one.token for (one,) in sample(LOGITS.repeat(n, 1), [chunk(seq) for seq in seqs])]
    wanted = reference(LOGITS, seqs[0].tokens, 2, seqs[0].params)
    for token, chance in enumerate(wanted):
        assert abs(drawn.count(token) - n * chance) <= 1
        assert chance > 0 or token not in drawn
    assert len(set(drawn)) > 1 or params.get("min_p") == 1


@pytest.mark.parametrize("few", [1, 2, 6])
def test_a_few_candidates_are_enough_or_all_are_sorted(monkeypatch, few):
    ties = torch.randint(0, 4, (200, 40), generator=torch.Generator().manual_seed(0)).float()
    params = [
        {"top_p": 0.7},
        {"top_k": 2},
        {"top_k": 30, "top_p": 0.3, "temperature": 0.2},
        {"top_p": 0.6, "temperature": 0.2},
        {"top_k": 7},
    ]
    chunks = [chunk(sequence(seed=i, **params[i % 5])) for i in range(200)]
    wanted = sample(ties, chunks)
    monkeypatch.setattr(sampler, "_draw_truncated", lambda x, s, w=few, draw=sampler._draw_truncated: draw(x, s, w))
    assert sample(ties, chunks) == wanted


def test_extremes_leave_the_best_token():
    for params in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}, {"temperature": 1e-44}, {"min_p": 1.0}):
        chunks = [chunk(sequence(seed=i, **params)) for i in range(50)]
        assert tokens(sample(LOGITS.repeat(50, 1), chunks)) == [[1]] * 50


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_no_number_reaches_what_has_no_chance(monkeypatch, number):
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: number)
    logits = torch.full((60, 1000), -float("inf"))
    logits[:, 400:500] = torch.randn(60, 100, generator=torch.Generator().manual_seed(1))
    params = [{}, *({"top_k": k} for k in range(1, 59)), {"top_p": 0.99}]
    chunks = [chunk(sequence(**each)) for each in params]
    assert all(400 <= token < 500 for (token,) in tokens(sample(logits, chunks)))


def test_uniform_numbers_are_uniform_and_independent():
    for numbers in (
        [uniform(7, i) for i in range(20_000)],
        [uniform(i, 7) for i in range(20_000)],
        [uniform(2**64 - 1 - i, i) for i in range(20_000)],
    ):
        assert all(0 <= u < 1 for u in numbers)
        for digits in (numbers, [u * 1024 % 1 for u in numbers]):
            cells = [0] * 100  # pairs of neighbours in a 10 x 10 grid
            for a, b in zip(digits[::2], digits[1::2], strict=True):
                cells[int(a * 10) * 10 + int(b * 10)] += 1
            assert sum((count - 100) ** 2 / 100 for count in cells) < 160  # 99 degrees of freedom: P = 1e-4


def test_a_draw_depends_on_seed_and_position_alone():
    numbers = [uniform(seed, position) for seed in (5, 6, 5 + sampler.GOLDEN) for position in range(8, 12)]
    assert len(set(numbers)) == len(numbers)
    assert uniform(5, 9) == uniform(5, 9)
    drawn = tokens(sample(LOGITS.repeat(40, 1), [chunk(sequence()) for _ in range(40)]))
    assert len({one for (one,) in drawn}) > 1, "without a seed, each sequence has its own"


def test_a_batch_mixes_rows_that_draw_and_rows_that_do_not():
    greedy, seeded = chunk(sequence(temperature=0.0)), chunk(sequence([0] * 5, seed=1))
    partial, broken = Chunk(sequence([0] * 8, seed=1), 3), chunk(sequence([0] * 6, seed=1, logprobs=1))
    logits = torch.stack([LOGITS, torch.full((6,), NAN), LOGITS])
    drawn = sample(logits, [greedy, partial, broken, seeded])
    assert drawn == [[Drawn(1)], [], [Drawn(INVALID_TOKEN)], *sample(LOGITS[None], [seeded])]
    assert sample(logits[:0], [partial]) == [[]]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9}])
def test_rows_that_are_not_finite_count_only_if_they_are_needed(params):
    rows = torch.stack([LOGITS, LOGITS, LOGITS])
    seq = sequence(seed=2, logit_bias={4: 90}, **params)
    for value in (NAN, float("inf"), -float("inf")):
        for row, wanted in ((0, [INVALID_TOKEN]), (1, [INVALID_TOKEN]), (2, [4, 4])):
            broken = rows.clone()
            broken[row, :] = value
            assert tokens(sample(broken, [chunk(seq, (4, 1))])) == [wanted]
    everything = sequence(min_tokens=9, stop_token_ids=tuple(range(6)), **params)
    assert tokens(sample(rows[:1], [chunk(everything)])) == [[INVALID_TOKEN]]


def test_before_min_tokens_no_end_token_is_drawn():
    for params in ({"temperature": 0.0}, {"seed": 1, "top_k": 2}):
        early, late, ignoring = (
            sequence(min_tokens=least, stop_token_ids=(3,), ignore_eos=ignore, **params)
            for least, ignore in ((3, False), (2, False), (3, True))
        )
        ((best,), (then,), (ignored,)) = tokens(
            sample(LOGITS.repeat(3, 1), [chunk(seq) for seq in (early, late, ignoring)], eos=(1,))
        )
        assert best in (5, 0), "neither eos 1 nor stop token 3"
        assert then in (1, 3) and ignored in (1, 5)
    drafted = sequence(min_tokens=3, temperature=0.0)
    assert tokens(sample(LOGITS.repeat(3, 1), [chunk(drafted, (3, 1))], eos=(1,))) == [[3, 1, 1]]


def test_drafts_are_accepted_up_to_the_first_that_differs():
    seq = sequence(temperature=0.0)
    rows = torch.nn.functional.one_hot(torch.tensor([4, 2, 5]), VOCAB).float()
    for drafts, wanted in (((4, 2), [4, 2, 5]), ((4, 3), [4, 2]), ((1, 2), [4]), ((4,), [4, 2]), ((), [4])):
        assert tokens(sample(rows[: 1 + len(drafts)], [chunk(seq, drafts)])) == [wanted]


def test_penalties_count_the_prompt_the_output_and_the_drafts_before_a_row():
    flat = torch.zeros(4, VOCAB)
    present = sequence((0, 1, 2), prompt=2, temperature=0.0, presence_penalty=1.0, logit_bias={0: 0.5, 1: 0.25})
    assert tokens(sample(flat, [chunk(present, (0, 1, 3))])) == [[0, 1, 3, 4]], "the prompt does not count"
    repeated = sequence((0, 1, 2), prompt=2, temperature=0.0, repetition_penalty=2.0)
    rows = torch.tensor([[2.0, 2.0, 2.0, 1.5, 1.25, -9.0]]).repeat(3, 1)
    assert tokens(sample(rows, [chunk(repeated, (3, 4))])) == [[3, 4, 0]], "but here it does"


def test_log_probabilities_are_those_of_the_model():
    params = {"temperature": 0.3, "seed": 4, "logit_bias": {2: 50}, "presence_penalty": 2.0, "top_k": 1}
    (asked, few, none), (drafted,) = (
        sample(LOGITS.repeat(3, 1), [chunk(sequence(logprobs=top, **params)) for top in (2, 0, None)]),
        sample(LOGITS.repeat(2, 1), [chunk(sequence(logprobs=20, **params), (2,))]),
    )
    wanted = LOGITS.double().log_softmax(0).tolist()
    assert asked[0].token == few[0].token == none[0].token == 2
    assert asked[0].logprob == few[0].logprob == pytest.approx(wanted[2], abs=1e-6)
    assert [token for token, _ in asked[0].top] == [1, 3] and few[0].top == none[0].top == ()
    assert none[0].logprob is None
    assert [len(one.top) for one in drafted] == [6, 6]
    for one in drafted:
        assert all(value == pytest.approx(wanted[token], abs=1e-6) for token, value in one.top)


def test_log_probabilities_of_a_prompt(monkeypatch):
    monkeypatch.setattr(sampler, "BLOCK", 4)
    logits = torch.randn(11, 50, generator=torch.Generator().manual_seed(2))
    targets = torch.arange(11) * 3
    wanted = logits.double().log_softmax(-1)
    drawn = prompt_logprobs(logits, targets, 3)
    assert [one.token for one in drawn] == targets.tolist()
    for row, one in enumerate(drawn):
        assert one.logprob == pytest.approx(wanted[row, one.token].item(), abs=1e-5)
        assert [token for token, _ in one.top] == wanted[row].topk(3).indices.tolist()
        assert one.top[0][1] == pytest.approx(wanted[row].max().item(), abs=1e-5)


class Model:
    """Logits as a function of the tokens before."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        digest = hashlib.blake2b(repr((self.seed, tokens)).encode(), digest_size=VOCAB).digest()
        return torch.tensor([byte // 32 / 2 - 1 for byte in digest])  # with many ties


def generate(model, seqs, guess=lambda seq: ()) -> list[list[Drawn]]:
    """Six tokens for each sequence, in steps that draft guess(sequence)."""
    made = Sampler((5,), None, VOCAB)
    outputs: dict[Sequence, list[Drawn]] = {seq: [] for seq in seqs}
    for seq in seqs:
        made.prepare(seq)
    while left := [seq for seq in seqs if len(outputs[seq]) < 6]:
        chunks = []
        for seq in left:
            seq.num_computed = len(seq.tokens) - 1
            chunks.append(chunk(seq, guess(seq)))
        rows = [model(c.seq.tokens + list(c.drafts[:i])) for c in chunks for i in range(1 + len(c.drafts))]
        for seq, drawn in zip(left, made(torch.stack(rows), Batch(chunks)), strict=True):
            seq.tokens += [one.token for one in drawn]
            outputs[seq] += drawn
    return [outputs[seq][:6] for seq in seqs]


requests = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.4, 1.0, 3.0]),
        "top_k": st.integers(0, VOCAB),
        "top_p": st.sampled_from([1.0, 0.9, 0.4]),
        "min_p": st.sampled_from([0.0, 0.0, 0.2]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, -0.7]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.8]),
        "logit_bias": st.sampled_from([{}, {}, {0: 1.5, 3: -2}]),
        "min_tokens": st.integers(0, 4),
        "logprobs": st.sampled_from([None, 0, 2]),
        "seed": st.integers(0, 2**64 - 1),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=1, max_size=4), st.integers(0, 99), st.randoms(use_true_random=False))
def test_neither_drafts_nor_neighbours_change_what_is_drawn(params, seed, random):
    model = Model(seed)

    def made() -> list[Sequence]:
        return [sequence((1, 2, i), prompt=2 + i % 2, **each) for i, each in enumerate(params)]

    alone = [generate(model, [seq])[0] for seq in made()]
    assert generate(model, made()) == alone
    right = {
        seq: [0] * len(seq.tokens) + [one.token for one in drawn] for seq, drawn in zip(made(), alone, strict=True)
    }
    seqs = list(right)

    def guess(seq: Sequence) -> tuple[int, ...]:
        known = right[seq][len(seq.tokens) :][: random.randint(0, 4)]
        return tuple(token if random.random() < 0.8 else random.randrange(VOCAB) for token in known)

    assert generate(model, seqs, guess) == alone


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"logit_bias": {6: 1}}, "logit_bias holds 6; ids lie between 0 and 5"),
        ({"logit_bias": {-1: 1}}, "logit_bias holds -1"),
    ],
)
def test_what_the_vocabulary_does_not_have(params, words):
    with pytest.raises(RequestError, match=words) as error:
        Sampler((), None, VOCAB).prepare(sequence(**params))
    assert error.value.param == next(iter(params))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_p": 1.5}, "min_p is 1.5; it must be between 0 and 1"),
        ({"presence_penalty": -2.5}, "between -2 and 2"),
        ({"frequency_penalty": NAN}, "between -2 and 2"),
        ({"frequency_penalty": "1"}, "a number"),
        ({"repetition_penalty": 0.001}, "between 0.01 and 2"),
        ({"logit_bias": [1]}, "a mapping"),
        ({"logit_bias": {"1": 1}}, "gives '1' 1"),
        ({"logit_bias": {1: 101}}, "gives 1 101; .* -100 and 100"),
        ({"logit_bias": {1: True}}, "gives 1 True"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "1025 ids; at most 1024"),
        ({"logprobs": 21}, "logprobs is 21; it must be between 0 and 20"),
        ({"prompt_logprobs": -1}, "between 0 and 20"),
        ({"logprobs": True}, "a whole number"),
        ({"n": 0}, "n is 0; it must be between 1 and 64"),
        ({"n": None}, "a whole number"),
        ({"grammar": "a*"}, "a Grammar or None"),
    ],
)
def test_parameters_out_of_range(values, words):
    with pytest.raises(RequestError, match=words) as error:
        SamplingParams(**values)
    assert error.value.param == next(iter(values))


def test_a_forgotten_sequence_is_not_drawn_for():
    seq = sequence(presence_penalty=1.0)
    made = Sampler((), None, VOCAB)
    made.prepare(seq)
    made.forget(seq)
    made.forget(seq)
    with pytest.raises(KeyError):
        made(LOGITS[None].clone(), Batch([chunk(seq)]))
    assert hash(replace(seq.params, logit_bias={1: 2}))
