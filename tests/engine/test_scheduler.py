"""The scheduler and the prefix cache against a model of the KV cache that knows what every slot holds, under random
arrivals, lengths, common prefixes, drafts, aborts, failures, stores and pool sizes."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_model import VOCAB, KvModel, continuation, guess

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import Drawn, QueueFull, SamplingParams, Sequence
from hetero_glm5.engine.kv_cache import PagePool
from hetero_glm5.engine.prefix_cache import PrefixCache
from hetero_glm5.engine.scheduler import INVALID_TOKEN, Scheduler
from hetero_glm5.engine.stopping import Stopping

PAGE = 4


class Memory:
    """A page store in a dict; a fetch takes `delay` looks to be done."""

    def __init__(self, delay: int = 0):
        self.pages: dict[bytes, tuple] = {}
        self.delay = delay

    def key(self, parent, tokens, salt=None) -> bytes:
        return repr((parent, tuple(tokens), salt if parent is None else None)).encode()

    def __contains__(self, key) -> bool:
        return key in self.pages

    def touch(self, keys):
        pass

    def discard(self, keys):
        assert all(keys), "a page without a key was never kept"
        for key in keys:
            self.pages.pop(key, None)

    def fetch(self, keys):
        found = []
        for key in keys:
            if key not in self.pages:
                break
            found.append(self.pages[key])
        return Reading(found, self.delay)


@dataclass
class Reading:
    found: list
    looks: int
    pages: list = field(default_factory=list)

    @property
    def done(self) -> bool:
        self.looks -= 1
        if self.looks < 0:
            self.pages = self.found
        return self.looks < 0

    def cancel(self) -> None:
        self.found = self.pages = []
        self.looks = 0


class World:
    """A scheduler, and the model that computes what it schedules."""

    def __init__(self, pool_pages=8, store=None, seed=0, **flags):
        self.model = KvModel(pool_pages, PAGE)
        config = EngineConfig(**flags)
        cache = PrefixCache(PagePool(pool_pages, PAGE), enabled=not config.disable_radix_cache, key=store and store.key)
        self.store, self.rng = store, random.Random(seed)
        self.scheduler = Scheduler(config, cache, Stopping((), pool_pages * PAGE, None), store)

    def step(self, drafts=0):
        """Schedules, computes and commits. Checks what must always hold."""
        scheduler = self.scheduler
        batch = scheduler.schedule()
        self.check(batch)
        events = scheduler.commit(batch, self.model.forward(batch))
        for seq in scheduler.running:
            if seq.decoding and drafts:
                seq.drafts = guess(seq, self.rng, min(drafts, seq.params.max_tokens - seq.num_output - 1))
        for node in scheduler.cache.take_fresh():
            if self.store is not None:
                self.store.pages[node.key] = self.model.read_page(node.page)
        return batch, events

    def check(self, batch):
        scheduler, cache = self.scheduler, self.scheduler.cache
        seqs = [chunk.seq for chunk in batch.chunks]
        assert len(set(map(id, seqs))) == len(seqs) <= scheduler.config.max_running_requests
        prefill = sum(chunk.count for chunk in batch.chunks if not chunk.seq.decoding)
        assert prefill <= scheduler.config.chunked_prefill_size
        for chunk in batch.chunks:
            assert len(chunk.seq.pages) * PAGE >= chunk.start + chunk.num_rows, "a row without a slot"
        assert all(not seq.pages and seq.num_computed == 0 for seq in scheduler.waiting)
        held = {page for seq in scheduler.running for page in seq.pages}
        assert len(held) + cache.num_available <= cache.pool.num_pages, "a page is held and available"

    def drain(self, drafts=0, limit=5000):
        events = []
        for _ in range(limit):
            if not (self.scheduler.running or self.scheduler.waiting):
                return events
            events += self.step(drafts)[1]
        raise AssertionError("requests are stuck")

    def finish(self):
        """Nothing is held when nothing runs, and the pool comes back whole."""
        cache = self.scheduler.cache
        self.scheduler.schedule()
        assert cache.num_available == cache.pool.num_pages
        cache.clear()
        assert cache.pool.num_free == cache.pool.num_pages and not cache._roots and not cache._held


def request(prompt, output: int, **more) -> Sequence:
    tokens = [1] * prompt if isinstance(prompt, int) else list(prompt)
    return Sequence(tokens, SamplingParams(max_tokens=output), len(tokens), **more)


STEMS = [continuation([stem], 30) for stem in range(VOCAB)]
PROMPTS = st.builds(
    lambda stem, keep, rest: (STEMS[stem][:keep] + rest)[:20] or [0],
    st.integers(0, 1), st.integers(0, 18), st.lists(st.integers(0, 1), max_size=8),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    requests=st.lists(
        st.tuples(PROMPTS, st.integers(1, 12), st.integers(0, 6), st.sampled_from([None, None, "salt"])),
        min_size=1, max_size=12,
    ),
    pool_pages=st.integers(8, 20),
    chunk=st.integers(1, 9),
    most=st.integers(1, 5),
    options=st.tuples(st.booleans(), st.booleans(), st.sampled_from([None, 0, 1, 2, 3]), st.integers(0, 4)),
    trouble=st.dictionaries(st.integers(0, 11), st.sampled_from(["abort", "nan"])),
    fails=st.dictionaries(st.integers(0, 20), st.sampled_from(["fail", "interrupt"]), max_size=2),
)  # fmt: skip
def test_every_request_gets_its_own_tokens(requests, pool_pages, chunk, most, options, trouble, fails):
    mixed, plain, delay, drafts = options
    store = None if delay is None or plain else Memory(delay)
    flags = {"chunked_prefill_size": chunk, "max_running_requests": most, "enable_mixed_chunk": mixed}
    world = World(pool_pages, store, disable_radix_cache=plain, **flags)
    scheduler = world.scheduler
    seqs = [request(prompt, output, salt=salt) for prompt, output, _, salt in requests]
    arrivals = sorted(range(len(seqs)), key=lambda i: requests[i][2])
    events, clock = [], 0
    while arrivals or scheduler.running or scheduler.waiting:
        while arrivals and requests[arrivals[0]][2] <= clock:
            scheduler.add(seqs[arrivals.pop(0)])
        if clock in fails:  # what was scheduled is never computed
            batch = scheduler.schedule()
            if fails[clock] == "fail":
                events += scheduler.fail(batch, "the device is lost")
            for seq in [*scheduler.running] if fails[clock] == "interrupt" else []:
                scheduler.abort(seq)
        else:
            events += world.step(drafts)[1]
        for i, kind in trouble.items():
            if i < len(seqs) and i % 7 == clock and i not in arrivals:
                if kind == "abort":
                    scheduler.abort(seqs[i])
                elif seqs[i] in scheduler.running:
                    events.append(scheduler._fail(seqs[i], "NaN", "found"))
        clock += 1
        assert clock < 3000, "requests are stuck"
    for seq, (prompt, output, _, _) in zip(seqs, requests, strict=True):
        mine = [event for event in events if event.seq is seq]
        expected = continuation(prompt, output)
        assert seq.output == expected[: seq.num_output] and not seq.pages
        assert [event.token for event in mine if event.error is None] == seq.output
        if seq.finish_reason == "length":
            assert seq.num_output == output
            assert [event.finish_reason for event in mine] == [None] * (output - 1) + ["length"]
        else:
            assert seq.finish_reason in ("abort", "error")
    world.finish()


def test_a_commit_that_fails_midway_loses_no_event():
    world = World(20)
    scheduler, seqs = world.scheduler, [request([i, i], 1) for i in range(3)]
    for seq in seqs:
        scheduler.add(seq)
    batch = scheduler.schedule()
    judge = scheduler.stopping.event

    def event(seq, drawn):
        if seq is seqs[1]:
            raise MemoryError
        return judge(seq, drawn)

    scheduler.stopping.event = event
    with pytest.raises(MemoryError):
        scheduler.commit(batch, world.model.forward(batch))
    events = scheduler.fail(batch, "no luck")
    assert [(event.seq, event.finish_reason) for event in events] == [
        (seqs[0], "length"), (seqs[1], "error"), (seqs[2], "error"),
    ]  # fmt: skip
    assert scheduler.fail(batch, "no luck") == []
    world.finish()


def test_what_was_computed_is_not_computed_again():
    world = World(40, chunked_prefill_size=8)
    prompt = continuation([3], 21)
    first = request(prompt, 9)
    world.scheduler.add(first)
    world.drain()
    turn = request([*first.tokens, 1, 1, 0], 5)
    world.scheduler.add(turn)
    batch, _ = world.step()
    assert turn.num_cached == len(first.tokens) - 1, "all but the last token, which was drawn and not computed"
    assert [chunk.count for chunk in batch.chunks] == [4]
    again = request(prompt, 2)
    world.scheduler.add(again)
    world.step()
    assert again.num_cached == len(prompt) - 1
    other = request([*prompt[:10], 7 % VOCAB, *prompt[:5]], 2)
    world.scheduler.add(other)
    world.step()
    assert other.num_cached in (10, 11)
    world.drain()
    counts = world.scheduler.counts
    assert counts.cached_tokens == turn.num_cached + again.num_cached + other.num_cached
    assert counts.prefilled_tokens == counts.prompt_tokens - counts.cached_tokens


def test_a_cancelled_prompt_goes_on_where_it_was():
    world = World(40, chunked_prefill_size=6)
    prompt = continuation([2], 50)
    cancelled, retry = request(prompt, 3), request(prompt, 3)
    world.scheduler.add(cancelled)
    for _ in range(4):
        world.step()
    world.scheduler.abort(cancelled)
    world.scheduler.add(retry)
    world.step()
    assert retry.num_cached == 24
    world.drain()
    assert retry.output == continuation(prompt, 3)


def test_a_prefix_that_is_being_computed_is_waited_for():
    world = World(40, chunked_prefill_size=8)
    stem = continuation([1], 30)
    seqs = [request([*stem, i, i], 4) for i in range(3)]
    for seq in seqs:
        world.scheduler.add(seq)
    world.drain()
    assert world.scheduler.counts.prefilled_tokens <= len(stem) + 2 + 2 * (2 + PAGE)
    assert [seq.output for seq in seqs] == [continuation([*stem, i, i], 4) for i in range(3)]


def test_copies_of_one_prompt_share_all_of_it():
    world = World(40, chunked_prefill_size=8)
    prompt = continuation([1], 30)
    for _ in range(4):
        world.scheduler.add(request(prompt, 6))
    world.drain()
    assert world.scheduler.counts.prefilled_tokens <= len(prompt) + 3 * PAGE


def test_a_longer_leaf_takes_the_place_of_a_shorter():
    world = World(8)
    for prompt in ([1, 1], [1, 1, 2], [1, 1, 2, 3, 0]):
        world.scheduler.add(request(prompt, 1))
        world.drain()
    match = world.scheduler.cache.match(request([1, 1, 2, 3, 0, 0], 1))
    assert len(match.nodes) == 1 and match.part == 1
    assert world.scheduler.cache.num_kept == 2, "what says nothing more is not kept"


def test_salts_are_apart():
    world = World(40)
    prompt = continuation([1], 20)
    for salt, known in (("a", 0), ("b", 0), ("a", 19), (None, 0)):
        seq = request(prompt, 2, salt=salt)
        world.scheduler.add(seq)
        world.drain()
        assert seq.num_cached == known


def test_pages_come_back_from_the_store_after_a_restart():
    store = Memory(delay=3)
    prompt = continuation([1], 33)
    before = World(40, store)
    before.scheduler.add(request(prompt, 8))
    before.drain()
    after = World(40, store, chunked_prefill_size=4)
    seq, other = request(prompt, 8), request(continuation([2], 9), 8)
    after.scheduler.add(seq)
    after.scheduler.add(other)
    after.step()
    assert other in after.scheduler.running and seq in after.scheduler.waiting, "nobody waits for the disk but its own"
    after.drain()
    assert seq.num_cached == 32 and seq.output == continuation(prompt, 8)
    assert after.scheduler.counts.restored_tokens == 32


def test_the_least_recently_used_goes_first():
    world = World(8)
    a, b, c = ([i] * 11 for i in range(3))
    for prompt in (a, b, a, c):  # two full pages each and a part; c needs the room of one
        seq = request(prompt, 1)
        world.scheduler.add(seq)
        world.drain()
    known = [world.scheduler.cache.match(request(prompt, 1)) for prompt in (a, b)]
    assert [len(match.nodes) for match in known] == [2, 2] and [match.part for match in known] == [2, 0]


def test_decode_rows_ride_along_with_a_long_prefill():
    world = World(100, chunked_prefill_size=8)
    first, long = request(3, 50), request(80, 1)
    world.scheduler.add(first)
    world.step()
    world.scheduler.add(long)
    for _ in range(9):
        batch, _ = world.step()
        assert [chunk.count for chunk in batch.chunks] == [1, 8] and batch.chunks[0].seq is first


def test_a_short_prompt_does_not_wait_for_a_long_one():
    world = World(100, chunked_prefill_size=16)
    long, short = request([0] * 200, 1), request([1] * 7, 1)
    world.scheduler.add(long)
    world.step()
    world.scheduler.add(short)
    batch, _ = world.step()
    assert {chunk.seq: chunk.count for chunk in batch.chunks} == {long: 9, short: 7} and short.finished


def test_the_oldest_prompt_has_half_of_each_step():
    world = World(200, chunked_prefill_size=12)
    seqs = [request([i % VOCAB] * 3 + [0, 1] * 30, 1) for i in range(4)]
    for seq in seqs:
        world.scheduler.add(seq)
    batch, _ = world.step()
    assert [chunk.count for chunk in batch.chunks] == [6, 2, 2, 2]


def test_without_mixing_decode_waits_for_the_prefill():
    world = World(100, chunked_prefill_size=8, enable_mixed_chunk=False)
    first, long = request(3, 50), request([0] * 16, 1)
    world.scheduler.add(first)
    world.step()
    world.scheduler.add(long)
    assert [world.step()[0].chunks[0].seq for _ in range(3)] == [long, long, first]


def test_the_youngest_is_preempted_and_goes_on():
    world = World(4)  # 16 slots
    old, young = request([0] * 7, 9), request([1] * 7, 9)
    world.scheduler.add(old)
    world.scheduler.add(young)
    world.step()
    while young not in world.scheduler.waiting:
        world.step()
    assert old in world.scheduler.running and young.num_output > 0 and young.num_computed == 0
    world.drain()
    assert old.output == continuation([0] * 7, 9) and young.output == continuation([1] * 7, 9)
    assert world.scheduler.counts.preemptions == 1


def test_drafts_that_are_right_save_steps():
    world = World(20)
    seq = request([2, 1], 20)
    world.scheduler.add(seq)
    world.step()
    steps = 1
    while not seq.finished:
        seq.drafts = tuple(continuation(seq.tokens, min(3, 19 - seq.num_output)))
        _, events = world.step()
        steps += 1
        assert len(events) == len(seq.drafts) + 1 or seq.finished
    assert steps == 6 and seq.output == continuation([2, 1], 20)
    counts = world.scheduler.counts
    assert counts.accepted_tokens == counts.drafted_tokens == 14


def test_the_queue_is_bounded():
    world = World(max_queued_requests=2)
    world.scheduler.add(request(1, 1))
    world.scheduler.add(request(1, 1))
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        world.scheduler.add(request(1, 1))


def test_a_deadline_ends_a_request_wherever_it_is():
    world = World(8, max_running_requests=1)
    running, waiting, patient = request(2, 5, deadline=10.0), request(2, 5, deadline=10.0), request([0], 5)
    for seq in (running, waiting, patient):
        world.scheduler.add(seq)
    world.step()
    assert world.scheduler.expire(9.9) == []
    events = world.scheduler.expire(10.0)
    assert [(event.seq, event.finish_reason) for event in events] == [(running, "error"), (waiting, "error")]
    world.drain()
    assert patient.finish_reason == "length"
    world.finish()


def test_logits_that_are_not_finite_fail_their_request_alone_and_are_not_reused():
    world = World()
    bad, good = request([0] * 5, 5), request([1] * 5, 5)
    world.scheduler.add(bad)
    world.scheduler.add(good)
    batch = world.scheduler.schedule()
    drawn = world.model.forward(batch)
    events = world.scheduler.commit(batch, [[Drawn(INVALID_TOKEN)], drawn[1]])
    assert [event.finish_reason for event in events] == ["error", None] and "not finite" in events[0].error
    assert bad.tokens == [0] * 5 and not bad.pages
    assert not world.scheduler.cache.match(bad).nodes and not world.scheduler.cache.match(bad).part
    world.drain()
    assert good.output == continuation([1] * 5, 5)
    world.finish()
