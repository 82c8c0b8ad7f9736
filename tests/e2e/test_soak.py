"""Clients that come and go for a while: nothing is lost, stuck, leaked or answered wrongly.

One seed decides what is asked, when, and what goes wrong. The engine is driven as the server's thread drives it.
"""

import ctypes
import re
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import psutil
import pytest
import torch
from oracle import LATENT_EPS
from tiny import tiny_checkpoint

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import Drawn, Grammar, QueueFull, RequestError, SamplingParams, Sequence, TokenEvent
from hetero_glm5.demo.tokenizer import build_tokenizer
from hetero_glm5.engine.engine import Engine
from hetero_glm5.engine.prefix_cache import NO_PAGE, Node, PrefixCache, _in_date
from hetero_glm5.engine.scheduler import NOT_FINITE, Counts
from hetero_glm5.placement.memory import GIB
from hetero_glm5.server.tokenizer import Tokenizer

SOAK_SECONDS = 1800
LEAST_STEPS = 300  # however slow the machine is
END, IDS = 511, 500  # ids from IDS on have no token
MOST_STEPS = 3000  # from asking to the end
PROMPT, ANSWER, REMEMBERED, SAMPLES = 110, 40, 40, 50
LATE, BROKEN = "the request's deadline has passed", "the step was made to fail"
GROWTH = 8 << 20  # bytes

BASE = {"max_total_tokens": 160, "page_size": 8, "latent_norm_eps": LATENT_EPS, "kt_cpuinfer": 1}
BUSY = BASE | {
    "max_running_requests": 4,
    "max_queued_requests": 12,
    "chunked_prefill_size": 24,
    "speculative_algorithm": "MTP",
    "speculative_num_steps": 4,
    "kv_host_size": 0.0006,
    "kv_disk_size": 0.004,
}
GRAMMARS = {
    Grammar("regex", "(ab|c[d-h]|[0-9]{2} )*"): "(ab|c[d-h]|[0-9]{2} )*",
    Grammar("json_schema", '{"enum": ["one", "two", 33]}'): '"one"|"two"|33',
    Grammar("lark", 'start: "yes" | "no" | /[x-z]{1,12}/'): "yes|no|[x-z]{1,12}",
}
REFUSED = [
    ([], {}),
    ([512], {}),
    ([-1, 3], {}),
    ([7] * 160, {}),
    ([7], {"max_tokens": 160}),
    ([7], {"n": 13}),
    ([7], {"temperature": -1.0}),
    ([7], {"stop_token_ids": (512,)}),
    ([7], {"logit_bias": {512: 1.0}}),
    ([7], {"grammar": Grammar("regex", "(")}),
]


class BrokenStep(Exception):
    pass


@dataclass
class Told:
    """What was heard of a sequence; `since`: the step before which it was asked for; `group`: its request's number."""

    since: int
    group: int
    drawn: list[Drawn] = field(default_factory=list)
    text: str = ""


@dataclass(frozen=True)
class Ended:
    prompt: list[int]
    params: SamplingParams
    seed: int
    drawn: list[Drawn]
    text: str
    reason: str


class Soak:
    """The clients of one engine after another, all on the same pages. `seen` counts what happened."""

    def __init__(self, folder: Path, pages: Path, seed: int):
        self.folder, self.pages, self.rng = folder, pages, Random(seed)
        self.open: dict[Sequence, Told] = {}
        self.known: deque[list[int]] = deque(maxlen=REMEMBERED)
        self.samples: list[Ended] = []
        self.seen: Counter[str] = Counter()
        self.rss: list[int] = []
        self.steps = self.groups = 0
        self.pace, self.until = 0.3, 0
        self.start()

    def start(self) -> None:
        self.engine = load(self.folder, BUSY | {"kv_disk_path": str(self.pages)})
        self.mine: Counter[str] = Counter()  # what this engine's counters must agree with
        runner, drafter = self.engine.runner, self.engine.drafter
        assert drafter is not None
        drafter.depth.choose = lambda sequences: self.rng.randrange(5)  # not what pays
        self.forward, runner.forward = runner.forward, self.spoilt_forward
        self.draft, drafter.draft = drafter.draft, self.mended_draft

    def run(self, seconds: float) -> None:
        """Ends with nothing open."""
        stop, least = time.monotonic() + seconds, self.steps + LEAST_STEPS
        while time.monotonic() < stop or self.steps < least:
            self.turn()
        self.drain()

    def restart(self) -> None:
        self.close()
        self.start()

    def close(self) -> None:
        self.engine.flush_cache()
        assert self.cache.pool.num_free == self.cache.pool.num_pages and not self.cache._roots
        self.check_counts(self.engine.scheduler.counts)
        self.engine.close()

    @property
    def cache(self) -> PrefixCache:
        return self.engine.scheduler.cache

    # The clients.

    def turn(self) -> None:
        """What clients do between two steps, and a step."""
        if self.steps >= self.until:  # another pace: nobody comes, some do, many do
            self.pace, self.until = self.rng.choice((0.0, 0.1, 0.2, 0.3, 1.0)), self.steps + self.rng.randrange(5, 60)
        if not self.engine.busy:
            self.check_drained()
            self.until = self.steps if self.pace == 0 else self.until
        for _ in range(int(self.pace + self.rng.random())):
            self.ask()
        if self.open and self.chance(0.03):
            self.leave(self.rng.choice([*self.open.values()]).group)
        if self.chance(0.015):
            self.engine.flush_cache()
            self.seen["flush"] += 1
        if self.engine.busy:
            self.step()
        else:
            assert self.engine.step() == []

    def drain(self) -> None:
        while self.engine.busy:
            self.step()
        assert not self.open
        self.check_drained()

    def ask(self) -> None:
        engine, params, prompt = self.engine, self.params(), self.prompt()
        waiting = engine.num_waiting
        if self.chance(0.08):
            prompt, fields = self.rng.choice(REFUSED)
            with pytest.raises(RequestError):
                engine.add_all(prompt, SamplingParams(**fields))
            self.seen["refused"] += 1
            return
        options = {"salt": self.rng.choice((None, None, None, "a", "b"))}
        if self.chance(0.1):
            options["timeout"] = self.rng.choice((0.0, 0.0, 0.05, 0.5, 60.0))
        try:
            added = engine.add_all(prompt, params, **options)
        except QueueFull:
            assert waiting + params.n > BUSY["max_queued_requests"]
            self.seen["full"] += 1
            self.mine["prompt"] += len(prompt) * max(BUSY["max_queued_requests"] - waiting, 0)  # in for a moment
            return
        assert len(added) == params.n and not set(added) & set(self.open)
        self.groups += 1
        self.open |= {seq: Told(self.steps, self.groups) for seq in added}
        self.mine["prompt"] += len(prompt) * params.n
        self.seen["asked"] += params.n

    def prompt(self) -> list[int]:
        """New, or the beginning of a known conversation and more, or a whole one, with or without more."""
        new = [self.rng.randrange(IDS) for _ in range(self.rng.choice((1, 5, 12, 30, 80)))]
        if not self.known or self.chance(0.25):
            return new
        known = self.rng.choice(self.known)
        cut = self.rng.choice((self.rng.randrange(len(known) + 1), max(len(known) - 12, 1), len(known)))
        return (known[:cut] + (new if self.chance(0.6) else []))[:PROMPT] or new

    def params(self) -> SamplingParams:
        rng, fields = self.rng, {}
        fields["temperature"] = rng.choice((0.0, 0.0, 0.0, 0.7, 1.0))
        fields["logprobs"] = rng.choice((None, 0, 1, 4))
        fields["max_tokens"] = rng.choice((1, 4, 12, 12, 25, ANSWER))
        choices = {
            "seed": rng.randrange(2**64),
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.02,
            "repetition_penalty": 1.3,
            "frequency_penalty": 0.6,
            "presence_penalty": -0.5,
            "logit_bias": {5: 3.0, 17: -20.0, END: 4.0},
            "prompt_logprobs": rng.randrange(3),
            "stop": tuple(rng.sample("eation 0123,.", 3)),
            "stop_token_ids": tuple(rng.sample(range(IDS), 20)),
        }
        fields |= {name: value for name, value in choices.items() if self.chance(0.08)}
        if self.chance(0.06):
            fields["n"] = rng.randrange(2, 5)
        if self.chance(0.1):
            fields["grammar"] = rng.choice([*GRAMMARS])
        elif self.chance(0.3):
            fields["ignore_eos"] = True
        elif self.chance(0.1):
            fields["min_tokens"] = fields["max_tokens"] // 2
        return SamplingParams(**fields)

    def leave(self, group: int) -> None:
        """A client goes away: nothing more may be heard of its sequences."""
        for seq in [seq for seq, told in self.open.items() if told.group == group]:
            self.engine.abort(seq)
            self.end(seq, "abort")

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    # The engine.

    def step(self) -> None:
        self.steps += 1
        try:
            events = self.engine.step()
        except BrokenStep as error:
            events = self.engine.fail_step(str(error))
            assert events, "the server would end"
            assert all(event.error == BROKEN and event.finish_reason == "error" for event in events)
            self.seen["broken"] += 1
        for event in events:
            self.hear(event)
        for seq, told in self.open.items():
            assert self.steps - told.since < MOST_STEPS, f"sequence {seq.id} is stuck"
        if self.steps % 5 == 0:
            self.check_open()
        if self.steps % 200 == 0:
            store = self.engine.store
            assert store is not None
            queued = store.stats["queued_pages"] * store.page_bytes  # as much as the disk is slow
            ctypes.CDLL(None).malloc_trim(0)  # what a queue once held is not in use
            self.rss.append(psutil.Process().memory_info().rss - queued)

    def spoilt_forward(self, batch, clock) -> torch.Tensor:
        trouble = self.rng.choices((None, "before", "after", "nan"), (300, 2, 2, 6))[0]
        if trouble == "before":
            raise BrokenStep(BROKEN)
        logits = self.forward(batch, clock)
        if trouble == "after":
            raise BrokenStep(BROKEN)
        if trouble == "nan" and len(logits):
            logits = logits.clone()
            logits[self.rng.randrange(len(logits)), self.rng.randrange(512)] = torch.nan
        return logits

    def mended_draft(self, computed, grow, context_length) -> None:
        """Some of the drafts are what was answered before: a random model's own are hardly ever right."""
        self.draft(computed, grow, context_length)
        if self.chance(0.003) and not all(chunk.seq.finished for chunk in self.engine.batch.chunks):
            raise BrokenStep(BROKEN)
        for seq in self.engine.scheduler.running:
            if seq.drafts and self.chance(0.8):
                at = len(seq.tokens)
                longer = (k for k in self.known if len(k) >= at + len(seq.drafts) and k[:at] == seq.tokens)
                known = next(longer, None)
                seq.drafts = seq.drafts if known is None else tuple(known[at : at + len(seq.drafts)])

    def hear(self, event: TokenEvent) -> None:
        seq = event.seq
        assert seq in self.open, "an event of a sequence that has ended"
        told = self.open[seq]
        told.text += event.text
        if event.token is not None:
            assert event.drawn is not None and event.drawn.token == event.token
            assert (event.drawn.logprob is None) == (seq.params.logprobs is None)
            assert len(event.drawn.top) == (seq.params.logprobs or 0)
            told.drawn.append(event.drawn)
        if event.error is not None:
            assert event.error in (LATE, BROKEN, NOT_FINITE), event.error
            assert event.error != LATE or seq.deadline is not None
            self.seen[event.error] += 1
        if event.finish_reason is not None:
            self.end(seq, event.finish_reason)

    def end(self, seq: Sequence, reason: str) -> None:
        told, p = self.open.pop(seq), seq.params
        self.seen[reason] += 1
        assert [drawn.token for drawn in told.drawn] == seq.output and seq.finish_reason == reason and not seq.pages
        assert seq.num_cached is None or 0 <= seq.num_cached < seq.num_prompt
        assert not any(stop in told.text for stop in p.stop) or p.min_tokens
        self.mine["cached"] += seq.num_cached or 0
        self.mine["told"] += len(told.drawn)
        if reason in ("stop", "length"):
            self.mine["prefilled"] += seq.num_prompt - seq.num_cached
            assert p.min_tokens <= seq.num_output <= p.max_tokens
            assert reason == "stop" or seq.num_output == p.max_tokens
            assert p.prompt_logprobs is None or len(seq.prompt_logprobs) == seq.num_prompt - 1
            assert reason != "stop" or p.grammar is None or p.stop or p.stop_token_ids or self.fits(p, told.text)
        self.known.append(seq.tokens)
        ended = Ended(seq.tokens[: seq.num_prompt], p, seq.seed, told.drawn, told.text, reason)
        if told.drawn:
            if len(self.samples) < SAMPLES:
                self.samples.append(ended)
            elif (at := self.rng.randrange(self.seen["asked"])) < SAMPLES:
                self.samples[at] = ended

    @staticmethod
    def fits(params: SamplingParams, text: str) -> bool:
        return re.fullmatch(GRAMMARS[params.grammar], text) is not None

    # What must hold.

    def check_open(self) -> None:
        """Between two steps: each table knows the open sequences and no others, and every page is where it counts."""
        engine, scheduler, cache = self.engine, self.engine.scheduler, self.cache
        running = set(scheduler.running)
        assert running | set(scheduler.waiting) == set(engine.sampler._shaping) == set(self.open)
        assert len(running) + len(scheduler.waiting) == len(self.open) and len(running) <= 4
        assert set(scheduler._awaited) | set(scheduler.restoring._asked) <= set(self.open)
        assert set(scheduler.stopping._shown) <= {seq.id for seq in self.open}
        assert scheduler._deadlines == sum(seq.deadline is not None for seq in self.open)
        assert set(cache._held) | set(cache._found) <= running and not cache._pinned and not scheduler._unfilled
        users = Counter(node for held in cache._held.values() for node in held)
        there = {*users, *evictable(cache)}
        assert {*tree(cache)} <= there and all(node.users == users[node] for node in there)
        assert cache.num_kept == sum(not node.users for node in there)
        pages = {node.page for node in there} | {page for seq in running for page in seq.pages}
        assert sorted([*pages, *cache.pool._free]) == list(range(cache.pool.num_pages))
        assert len(cache._fresh) <= cache.pool.num_pages and len(cache._leaves) <= 4 * cache.pool.num_pages + 1
        assert len(engine.runner.tensors._places) <= 4

    def check_drained(self) -> None:
        scheduler, cache = self.engine.scheduler, self.cache
        assert not self.open and cache.num_available == cache.pool.num_pages
        self.check_open()
        assert not (scheduler.restoring._asked or scheduler._awaited or scheduler.stopping._shown)
        self.seen["drained"] += 1

    def check_counts(self, counts: Counts) -> None:
        mine, stats = self.mine, self.engine.store.stats
        assert counts.prompt_tokens == mine["prompt"] and counts.cached_tokens == mine["cached"]
        assert counts.prefilled_tokens >= mine["prefilled"]
        assert counts.decoded_tokens <= mine["told"] and counts.accepted_tokens <= counts.drafted_tokens
        assert not any(stats[name] for name in ("dropped", "damaged", "read_errors", "write_errors"))
        for place in ("host", "disk"):
            assert 0 < stats[f"{place}_bytes"] <= BUSY[f"kv_{place}_size"] * GIB
        for name in ("preemptions", "cached_tokens", "restored_tokens", "drafted_tokens", "accepted_tokens"):
            self.seen[name] += getattr(counts, name)

    def check_answers(self) -> None:
        """The samples' prompts, each alone on an engine that keeps and drafts nothing. Every step has few rows,
        so neighbours and chunks change no bit, and near ties excuse nothing."""
        engine = load(self.folder, BASE | {"disable_radix_cache": True, "chunked_prefill_size": PROMPT})
        wrong = [ended for ended in self.samples if not is_repeated(engine, ended)]
        engine.close()
        assert not wrong, wrong


def is_repeated(engine: Engine, ended: Ended) -> bool:
    """Whether the engine answers so too, or begins so if the answer was cut short."""
    seq = engine.add_all(ended.prompt, ended.params)[0]
    seq.seed = ended.seed
    drawn, text = [], ""
    while not seq.finished:
        for event in engine.step():
            drawn.append(event.drawn)
            text += event.text
    if ended.reason in ("stop", "length"):
        return same(drawn, ended.drawn) and (text, seq.finish_reason) == (ended.text, ended.reason)
    return same(drawn[: len(ended.drawn)], ended.drawn) and text.startswith(ended.text)


def same(some: list[Drawn], others: list[Drawn]) -> bool:
    """The same tokens, and as likely ones."""
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(
        a.token == b.token and abs((a.logprob or 0) - (b.logprob or 0)) < 1e-5 for a, b in pairs
    )


def load(folder: Path, flags: dict) -> Engine:
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", **flags)
    return Engine.load(config, tokenizer=Tokenizer.from_folder(folder))


def tree(cache: PrefixCache) -> Iterator[Node]:
    todo = [*cache._roots.values()]
    while todo:
        children = todo.pop().children.values()
        yield from children
        todo += children


def evictable(cache: PrefixCache) -> Iterator[Node]:
    """Leaves, and what is above them: also what grew on nodes that were cut off since."""
    for entry in cache._leaves:
        node = entry[2] if _in_date(*entry) else None
        while node is not None and node.page != NO_PAGE and (node.parent or not node.children):
            yield node
            node = node.parent


@pytest.fixture(scope="module")
def folder(checkpoints):
    folder = tiny_checkpoint(checkpoints, eos_token_id=[END])
    build_tokenizer(IDS).save(str(folder / "tokenizer.json"))
    return folder


def soak(folder: Path, pages: Path, seconds: float, seed: int) -> Soak:
    clients = Soak(folder, pages, seed)
    clients.run(seconds / 2)
    clients.restart()
    clients.run(seconds / 2)
    clients.close()
    clients.check_answers()
    seen = clients.seen
    print(clients.steps, "steps:", dict(seen))
    assert seen["asked"] == sum(seen[reason] for reason in ("stop", "length", "abort", "error"))
    happened = ("stop", "length", "abort", "refused", "full", "flush", "broken", "drained", LATE, BROKEN, NOT_FINITE)
    counted = ("preemptions", "cached_tokens", "restored_tokens", "drafted_tokens", "accepted_tokens")
    assert all(seen[name] for name in happened + counted) and len(clients.samples) == SAMPLES
    return clients


def test_clients_come_and_go(folder, tmp_path):
    soak(folder, tmp_path, seconds=8, seed=1)


@pytest.mark.slow
def test_clients_come_and_go_for_long(folder, tmp_path):
    """Memory stays as it is once the second engine has run for a while."""
    rss = soak(folder, tmp_path, SOAK_SECONDS, seed=2).rss
    early, late = rss[len(rss) * 5 // 8 : len(rss) * 3 // 4], rss[len(rss) * 7 // 8 :]
    print(f"RSS {statistics.median(early) / 2**20:.1f} MiB, then {statistics.median(late) / 2**20:.1f} MiB")
    assert statistics.median(late) <= statistics.median(early) + GROWTH
