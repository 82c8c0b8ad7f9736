"""Reuse changes no token: conversations whose turns grow on earlier answers, in fp32, with every way to keep, draft,
move and lose what was computed, against the same prompts computed whole and alone."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracle import LATENT_EPS, random_ids
from tiny import tiny_checkpoint

from hetero_glm5.core import Grammar, RequestError, SamplingParams, Sequence
from hetero_glm5.demo.tokenizer import build_tokenizer
from hetero_glm5.llm import LLM, Output

END = 511
GREEDY = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
FIRST = [random_ids(29, seed=1), [*random_ids(29, seed=1)[:21], *random_ids(9, seed=2)], random_ids(7, seed=3)]
SAID = [[random_ids(length, seed=10 * turn + who) for who, length in enumerate((5, 8, 3))] for turn in range(2)]
MTP = {"speculative_algorithm": "MTP", "speculative_num_steps": 4}


@pytest.fixture(scope="module")
def folder(checkpoints):
    folder = tiny_checkpoint(checkpoints, eos_token_id=[END])
    build_tokenizer(500).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def start(folder):
    """start(**flags): an LLM on the tiny model, closed in the end."""
    started = []

    def make(**flags) -> LLM:
        flags = {"max_total_tokens": 512, "page_size": 8, "latent_norm_eps": LATENT_EPS, "kt_cpuinfer": 1} | flags
        started.append(LLM(folder, device="cpu", dtype="float32", **flags))
        return started[-1]

    yield make
    for llm in started:
        llm.close()


def talk(llm: LLM, params=GREEDY, between: Callable[[], LLM | None] = lambda: None) -> list[list[Output]]:
    """Three conversations at a time, of three turns; `between` turns something happens, which may give another LLM."""
    turns = [llm.generate(FIRST, params)]
    for said in SAID:
        llm = between() or llm
        prompts = [o.prompt_token_ids + o.token_ids + more for o, more in zip(turns[-1], said, strict=True)]
        turns.append(llm.generate(prompts, params))
    return turns


def tokens(turns: list[list[Output]]) -> list[list[list[int]]]:
    return [[output.token_ids for output in turn] for turn in turns]


def alone(llm: LLM, turns: list[list[Output]], params=GREEDY) -> list[list[list[int]]]:
    """The answers to the same prompts, one at a time."""
    return [[llm.generate([o.prompt_token_ids], params)[0].token_ids for o in turn] for turn in turns]


@pytest.fixture(scope="module")
def plain(folder):
    """What an engine says that keeps nothing, asked one prompt at a time; by the type of the cache."""
    answers = {}
    for dtype in ("float32", "fp8_e4m3"):
        flags = {"max_total_tokens": 512, "page_size": 8, "latent_norm_eps": LATENT_EPS, "kv_cache_dtype": dtype}
        with LLM(folder, device="cpu", dtype="float32", disable_radix_cache=True, **flags) as llm:
            turns = talk(llm)
            answers[dtype] = alone(llm, turns)
            assert tokens(turns) == answers[dtype] and llm.engine.scheduler.counts.cached_tokens == 0
    assert answers["float32"] != answers["fp8_e4m3"]
    return answers


def is_reused(turns: list[list[Output]]) -> bool:
    """Whether only what is new of each turn was computed: the last token drawn, and what was said after it."""
    return all(
        output.num_cached == len(output.prompt_token_ids) - len(more) - 1
        for turn, said in zip(turns[1:], SAID, strict=True)
        for output, more in zip(turn, said, strict=True)
    )


@pytest.mark.parametrize(("page", "chunk"), [(8, 2048), (8, 3), (64, 17), (1, 2048), (7, 5)])
def test_turns_that_grow_on_their_answers(start, plain, page, chunk):
    turns = talk(start(chunked_prefill_size=chunk, page_size=page))
    assert tokens(turns) == plain["float32"] and is_reused(turns)


def fix_depth(monkeypatch, llm: LLM, depth: int) -> None:
    monkeypatch.setattr(llm.engine.drafter.depth, "choose", lambda sequences: depth)


@pytest.mark.parametrize(
    ("depth", "flags"),
    [(0, {}), (1, {}), (2, {"page_size": 64}), (3, {"chunked_prefill_size": 5}), (4, {}), (4, {"page_size": 1})],
)
def test_the_models_own_drafts(start, plain, monkeypatch, depth, flags):
    llm = start(**MTP, **flags)
    fix_depth(monkeypatch, llm, depth)
    turns = talk(llm)
    assert tokens(turns) == plain["float32"] and is_reused(turns)
    assert (llm.engine.scheduler.counts.drafted_tokens > 0) == (depth > 0)


class Oracle:
    """In the drafter's place: drafts up to four tokens of the answers that are known, of which each is right with the
    chance that is given; the same ones every time."""

    def __init__(self, llm: LLM, answers: list[list[int]], right: float):
        self.scheduler, self.answers, self.right = llm.engine.scheduler, answers, right
        llm.engine.drafter.draft = self.draft
        self.number = itertools.count()

    def draft(self, computed, grow, context_length) -> None:
        for seq in self.scheduler.running:
            if seq.decoding:
                seq.drafts = tuple(self._next(seq))[: seq.params.max_tokens - seq.num_output - 1]

    def _next(self, seq: Sequence) -> list[int]:
        known = next((a for a in self.answers if a[: len(seq.tokens)] == seq.tokens), seq.tokens)
        chance = torch.Generator().manual_seed(next(self.number))
        wrong = torch.rand(4, generator=chance).ge(self.right).tolist()
        return [(token + w) % 512 for token, w in zip(known[len(seq.tokens) :][:4], wrong, strict=False)]


def whole(turns: list[list[Output]]) -> list[list[int]]:
    return [o.prompt_token_ids + o.token_ids for turn in turns for o in turn]


@pytest.mark.parametrize("right", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("flags", [{}, {"page_size": 64, "chunked_prefill_size": 9}])
def test_drafts_that_are_right_and_wrong(start, plain, right, flags):
    llm = start(**MTP, **flags)
    oracle = Oracle(llm, [], right)
    oracle.answers = whole(talk(llm))
    llm.engine.flush_cache()
    before = replace(llm.engine.scheduler.counts)
    turns = talk(llm)
    assert tokens(turns) == plain["float32"] and is_reused(turns)
    counts = llm.engine.scheduler.counts
    drafted, accepted = counts.drafted_tokens - before.drafted_tokens, counts.accepted_tokens - before.accepted_tokens
    assert drafted > 50 and (accepted == drafted) == (right == 1) and (accepted == 0) == (right == 0)


@pytest.mark.parametrize("flags", [{}, MTP, {"kv_host_size": 0.01}, {"kv_host_size": 0.01, "chunked_prefill_size": 5}])
def test_preemption(start, plain, flags):
    llm = start(max_total_tokens=80, **flags)
    assert tokens(talk(llm)) == plain["float32"]
    assert llm.engine.scheduler.counts.preemptions > 0
    if "kv_host_size" in flags:
        assert llm.engine.scheduler.counts.restored_tokens > 0


@pytest.mark.parametrize("flags", [{}, MTP])
def test_neighbours_that_join_and_leave(start, plain, flags):
    """Each step one comes, and one of those before is aborted."""
    llm = start(max_total_tokens=1024, **flags)
    engine, others = llm.engine, []
    turns = talk(start(disable_radix_cache=True))
    prompts = [output.prompt_token_ids for turn in turns for output in turn]
    seqs = []
    for number in itertools.count():
        if number % 2 == 0 and prompts:
            seqs.append(engine.add(prompts.pop(0), GREEDY))
        others.append(engine.add(random_ids(number % 23 + 1, seed=number % 5), replace(GREEDY, max_tokens=40)))
        if number % 3:
            engine.abort(others.pop(number % len(others)))
        engine.step()
        if not prompts and all(seq.finished for seq in seqs):
            break
    assert [seq.output for seq in seqs] == sum(plain["float32"], [])


@pytest.mark.parametrize("dtype", ["float32", "fp8_e4m3"])
@pytest.mark.parametrize("flags", [{}, MTP])
def test_pages_that_come_back_from_host_memory(start, plain, dtype, flags):
    llm = start(kv_host_size=0.01, kv_cache_dtype=dtype, **flags)
    turns = talk(llm, between=llm.engine.flush_cache)
    assert tokens(turns) == plain[dtype]
    assert llm.engine.scheduler.counts.restored_tokens > 120
    for turn, said in zip(turns[1:], SAID, strict=True):
        for output, more in zip(turn, said, strict=True):
            assert output.num_cached == (len(output.prompt_token_ids) - len(more) - 1) // 8 * 8


@pytest.mark.parametrize("dtype", ["float32", "fp8_e4m3"])
def test_pages_that_come_back_from_disk(start, plain, tmp_path, dtype):
    flags = {"kv_disk_path": str(tmp_path), "kv_cache_dtype": dtype, "max_total_tokens": 512}
    llms = [start(**flags)]

    def restart() -> LLM:
        llms[-1].close()
        llms.append(start(**flags))
        return llms[-1]

    assert tokens(talk(llms[0], between=restart)) == plain[dtype]
    assert all(llm.engine.scheduler.counts.restored_tokens > 30 for llm in llms[1:])


KILLED = """
import sys, torch
from hetero_glm5.core import SamplingParams
from hetero_glm5.llm import LLM
torch.set_num_threads(1)
folder, pages, eps, prompt, more = eval(sys.argv[1])
llm = LLM(folder, device="cpu", dtype="float32", kv_disk_path=pages, page_size=8, max_total_tokens=512,
          latent_norm_eps=eps, kt_cpuinfer=1)
llm.generate([prompt], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
print("said", flush=True)
for number in range(10**6):
    llm.generate([more + [number % 500]], SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True))
"""


def test_pages_that_come_back_after_a_kill(start, folder, plain, tmp_path):
    """kill -9 while pages are being written. What is left is whole, or is not used."""
    arguments = repr((str(folder), str(tmp_path), LATENT_EPS, FIRST[0], random_ids(20, seed=99)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", KILLED, arguments], stdout=subprocess.PIPE, env=environment)
    assert child.stdout is not None and child.stdout.readline() == b"said\n"
    while len([*tmp_path.glob("??/*")]) < 30:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    llm = start(kv_disk_path=str(tmp_path))
    turns = talk(llm)
    assert tokens(turns) == plain["float32"] and turns[0][0].num_cached == 24


SEEDED = [
    SamplingParams(max_tokens=9, seed=7, ignore_eos=True),
    SamplingParams(max_tokens=9, seed=8, top_p=0.9, top_k=40, temperature=0.8, ignore_eos=True),
    SamplingParams(max_tokens=9, seed=9, min_p=0.02, ignore_eos=True, presence_penalty=1.0, repetition_penalty=1.3),
]


@pytest.fixture(scope="module")
def sampled(folder):
    flags = {"max_total_tokens": 512, "page_size": 8, "latent_norm_eps": LATENT_EPS, "disable_radix_cache": True}
    with LLM(folder, device="cpu", dtype="float32", **flags) as llm:
        turns = talk(llm, SEEDED)
        each = [[llm.generate([o.prompt_token_ids], p)[0] for o, p in zip(t, SEEDED, strict=True)] for t in turns]
        assert tokens(turns) == tokens(each)
        return turns


@pytest.mark.parametrize(
    ("drafts", "flags"),
    [
        (None, {"chunked_prefill_size": 3}),
        (None, {"max_total_tokens": 80}),
        (0.0, {"max_running_requests": 1}),
        (0.6, {"max_total_tokens": 80, "kv_host_size": 0.01}),
        (1.0, {}),
    ],
)
def test_seeded_answers(start, sampled, flags, drafts):
    llm = start(**flags, **({} if drafts is None else MTP))
    if drafts is not None:
        Oracle(llm, whole(sampled), drafts)
    assert tokens(talk(llm, SEEDED)) == tokens(sampled)
    counts = llm.engine.scheduler.counts
    assert counts.cached_tokens > 0 and (counts.accepted_tokens > 0) == bool(drafts)


TEXT = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True}
SHAPED = {
    "logprobs": SamplingParams(**TEXT, logprobs=3),
    "penalties": SamplingParams(**TEXT, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.2),
    "bias": SamplingParams(**TEXT, logit_bias={5: 3.0, 17: -20.0, 400: 1.5}),
    "min_tokens": SamplingParams(**TEXT | {"ignore_eos": False}, min_tokens=9, stop_token_ids=tuple(range(0, 500, 3))),
    "grammar": SamplingParams(max_tokens=30, temperature=0.0, grammar=Grammar("regex", "(ab|c[d-h]|[0-9]{2} )*")),
    "schema": SamplingParams(max_tokens=40, seed=3, grammar=Grammar("json_schema", '{"enum": ["one", "two", 33]}')),
}


@pytest.mark.parametrize("what", SHAPED)
def test_what_shapes_answers_does_so_with_drafts(start, what):
    """Right ones and wrong ones, and with a neighbour."""
    params, prompts = SHAPED[what], FIRST[:2]
    llm = start(disable_radix_cache=True)
    want = [llm.generate([prompt], params)[0] for prompt in prompts]
    for right in (1.0, 0.6):
        drafting = start(**MTP)
        Oracle(drafting, whole([want]), right)
        got = drafting.generate(prompts, params)
        assert [(o.token_ids, o.text, o.finish_reason) for o in got] == [
            (o.token_ids, o.text, o.finish_reason) for o in want
        ]
        assert drafting.engine.scheduler.counts.accepted_tokens > 0
        for a, b in zip(got, want, strict=True):
            assert (a.logprobs is None) == (b.logprobs is None) == (what != "logprobs")
            for one, other in zip(a.logprobs or [], b.logprobs or [], strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [t for t, _ in one.top] == [t for t, _ in other.top]


def test_stop_strings_end_an_answer_inside_drafts(start):
    """What follows the stop string in accepted drafts is not said, and the next turn is right."""
    llm = start(disable_radix_cache=True)
    free = llm.generate([FIRST[0]], SamplingParams(**TEXT))[0]
    text = next(t for t in (llm.tokenizer.decode(free.token_ids[i : i + 2]) for i in range(6, 14)) if t.isascii())
    params = replace(SamplingParams(**TEXT), stop=(text,))
    want = llm.generate([FIRST[0]], params)[0]
    assert want.finish_reason == "stop" and text not in want.text and len(want.token_ids) < 20
    drafting = start(**MTP)
    Oracle(drafting, whole([[free]]), 1.0)
    got = drafting.generate([FIRST[0]], params)[0]
    assert (got.token_ids, got.text) == (want.token_ids, want.text)
    following = FIRST[0] + got.token_ids + SAID[0][0]
    assert drafting.generate([following], GREEDY)[0].token_ids == llm.generate([following], GREEDY)[0].token_ids


def test_several_answers_are_separate_requests(start):
    """Seeds count up from the one given, and the prompt is computed once."""
    llm = start()
    params = SamplingParams(max_tokens=9, seed=40, n=4, ignore_eos=True)
    together = [output.token_ids for output in llm.generate([FIRST[0]], params)]
    assert llm.engine.scheduler.counts.prefilled_tokens < len(FIRST[0]) + 4 * 8
    each = [replace(params, n=1, seed=40 + i) for i in range(4)]
    assert together == [start().generate([FIRST[0]], one)[0].token_ids for one in each]
    assert len(set(map(tuple, together))) == 4


@pytest.mark.parametrize("flags", [{}, {"kv_host_size": 0.01}])
def test_salts_are_apart(start, plain, flags):
    engine = start(**flags).engine
    for salt, known in (("a", 0), ("b", 0), ("a", 28), (None, 0), ("a", 28), (None, 28)):
        seq = engine.add(FIRST[0], GREEDY, salt=salt)
        while engine.busy:
            engine.step()
        assert seq.num_cached == known and seq.output == plain["float32"][0][0]


def test_a_cancelled_prefill_is_continued(start, plain):
    engine = start(chunked_prefill_size=10).engine
    cancelled = engine.add(FIRST[0], GREEDY)
    for _ in range(2):
        engine.step()
    engine.abort(cancelled)
    retry = engine.add(FIRST[0], GREEDY)
    while engine.busy:
        engine.step()
    assert retry.num_cached == 20 and retry.output == plain["float32"][0][0]
    assert engine.scheduler.counts.prefilled_tokens == len(FIRST[0])


def test_a_deadline_ends_one_request(start, plain):
    engine = start().engine
    other = random_ids(20, seed=50)
    seqs = [engine.add(FIRST[0], GREEDY), engine.add(other, GREEDY, timeout=0.02), engine.add(FIRST[2], GREEDY)]
    engine.step()
    time.sleep(0.03)
    events = []
    while engine.busy:
        events += engine.step()
    assert [event.error for event in events if event.seq is seqs[1]] == ["the request's deadline has passed"]
    assert [seqs[0].output, seqs[2].output] == plain["float32"][0][::2]
    retry = engine.add(other, GREEDY)
    while engine.busy:
        engine.step()
    assert retry.num_cached == len(other) - 1 and retry.output[: seqs[1].num_output] == seqs[1].output


@pytest.mark.parametrize("where", ["logits", "hidden states"])
def test_nan_ends_one_request_and_nothing_of_it_is_reused(start, plain, monkeypatch, where):
    """Logits of the first row that draws in the sixth step; hidden states of a row in a prompt's middle."""
    engine = start(chunked_prefill_size=16).engine
    bad, good = engine.add(FIRST[0], GREEDY), engine.add(FIRST[2], GREEDY)
    model = engine.runner.model
    forward, steps = type(model).forward, itertools.count()

    def spoilt(self, rows, cache, experts):
        hidden = forward(self, rows, cache, experts).clone()
        spoil = {"logits": 5, "hidden states": 0}[where]
        if next(steps) == spoil:
            segment = next(s for s, c in zip(rows.segments, engine.batch.chunks, strict=True) if c.seq is bad)
            hidden[segment.stop - 1 if where == "logits" else segment.start + 2] = torch.nan
        return hidden

    monkeypatch.setattr(type(model), "forward", spoilt)
    events = []
    while engine.busy:
        events += engine.step()
    errors = [event.error for event in events if event.seq is bad and event.error]
    assert errors == ["the model's numbers are not finite for this request"] and bad.finish_reason == "error"
    assert good.output == plain["float32"][0][2]
    retry = engine.add(FIRST[0], GREEDY)
    while engine.busy:
        engine.step()
    assert retry.num_cached == 0 and retry.output == plain["float32"][0][0]


def test_what_cannot_be_is_refused(folder, start):
    llm = start(max_queued_requests=1)
    without = LLM(folder, device="cpu", dtype="float32", skip_tokenizer=True, max_total_tokens=64)
    grammar = SamplingParams(grammar=Grammar("regex", "a"))
    for engine, params, words in (
        (without.engine, grammar, "a grammar needs a tokenizer"),
        (without.engine, SamplingParams(stop=("a",)), "stop strings need a tokenizer"),
        (llm.engine, SamplingParams(grammar=Grammar("regex", "(")), "cannot be used as a grammar"),
        (llm.engine, SamplingParams(logit_bias={512: 1.0}), "logit_bias holds 512"),
        (llm.engine, SamplingParams(stop_token_ids=(-1,)), "stop_token_ids holds -1"),
        (llm.engine, SamplingParams(max_tokens=512), "max_tokens is 512"),
    ):
        with pytest.raises(RequestError, match=words):
            engine.add_all([1, 2], params)
        assert not engine.busy and not engine.sampler._shaping, "nothing stays of a refused request"
    without.close()
