"""The scheduler against rules that hold after every step, under random arrivals, lengths, aborts and pool sizes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import QueueFull, SamplingParams, Sequence
from hetero_glm5.engine.kv_cache import PagePool
from hetero_glm5.engine.scheduler import INVALID_TOKEN, Scheduler
from hetero_glm5.engine.stopping import Stopping

PAGE = 4


def make(pool_pages=8, **flags) -> Scheduler:
    pages = PagePool(pool_pages, PAGE)
    return Scheduler(EngineConfig(**flags), pages, Stopping((), pool_pages * PAGE, None))


def request(prompt: int, output: int) -> Sequence:
    return Sequence([1] * prompt, SamplingParams(max_tokens=output), prompt)


def step(scheduler: Scheduler):
    """Plays the model: token 7 for every chunk that draws. Checks what must always hold."""
    batch = scheduler.schedule()
    seqs = [chunk.seq for chunk in batch.chunks]
    assert len(set(map(id, seqs))) == len(seqs) <= scheduler.config.max_running_requests
    prefill = sum(chunk.count for chunk in batch.chunks if not chunk.seq.decoding)
    assert prefill <= scheduler.config.chunked_prefill_size
    owned = [page for seq in scheduler.running for page in seq.pages]
    assert len(owned) == len(set(owned)) and len(owned) + scheduler.pages.num_free == scheduler.pages.num_pages
    for chunk in batch.chunks:
        assert len(chunk.seq.pages) * PAGE >= chunk.start + chunk.count, "a row without a slot"
    assert all(not seq.pages and seq.num_computed == 0 for seq in scheduler.waiting)
    events = scheduler.commit(batch, [7 if chunk.samples else None for chunk in batch.chunks])
    return batch, events


def drain(scheduler: Scheduler, limit=5000):
    events = []
    for _ in range(limit):
        if not (scheduler.running or scheduler.waiting):
            return events
        events += step(scheduler)[1]
    raise AssertionError("requests are stuck")


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=12),
    pool_pages=st.integers(8, 20),
    chunk=st.integers(1, 9),
    most=st.integers(1, 5),
    mixed=st.booleans(),
    abort=st.sets(st.integers(0, 11)),
)
def test_every_request_is_answered_whole(requests, pool_pages, chunk, most, mixed, abort):
    scheduler = make(pool_pages, chunked_prefill_size=chunk, max_running_requests=most, enable_mixed_chunk=mixed)
    seqs = [request(prompt, output) for prompt, output, _ in requests]
    arrivals = sorted(range(len(seqs)), key=lambda i: requests[i][2])
    events, clock = [], 0
    while arrivals:
        while arrivals and requests[arrivals[0]][2] <= clock:
            scheduler.add(seqs[arrivals.pop(0)])
        events += step(scheduler)[1]
        for i in abort:
            if i < len(seqs) and i % 7 == clock and seqs[i] not in (seqs[j] for j in arrivals):
                scheduler.abort(seqs[i])
        clock += 1
    events += drain(scheduler)
    for seq, (_, output, _) in zip(seqs, requests, strict=True):
        mine = [event for event in events if event.seq is seq]
        assert len(mine) == seq.num_output and not seq.pages
        if seq.finish_reason != "abort":
            assert seq.output == [7] * output and seq.finish_reason == "length"
            assert [event.finish_reason for event in mine] == [None] * (output - 1) + ["length"]
    assert scheduler.pages.num_free == scheduler.pages.num_pages


def test_decode_rows_ride_along_with_a_long_prefill():
    scheduler = make(100, chunked_prefill_size=8)
    first, long = request(3, 50), request(80, 1)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(long)
    for _ in range(10):
        batch, _ = step(scheduler)
        assert [chunk.count for chunk in batch.chunks] == [1, 8] and batch.chunks[0].seq is first


def test_without_mixing_decode_waits_for_the_prefill():
    scheduler = make(100, chunked_prefill_size=8, enable_mixed_chunk=False)
    first, long = request(3, 50), request(16, 1)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(long)
    assert [step(scheduler)[0].chunks[0].seq for _ in range(3)] == [long, long, first]


def test_the_youngest_is_preempted_and_computed_again():
    scheduler = make(4)  # 16 slots
    old, young = request(7, 9), request(7, 9)
    scheduler.add(old)
    scheduler.add(young)
    step(scheduler)
    while young not in scheduler.waiting:
        step(scheduler)
    assert old in scheduler.running and young.num_output > 0 and young.num_computed == 0
    drain(scheduler)
    assert old.output == young.output == [7] * 9


def test_the_queue_is_bounded():
    scheduler = make(max_queued_requests=2)
    scheduler.add(request(1, 1))
    scheduler.add(request(1, 1))
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        scheduler.add(request(1, 1))


def test_logits_that_are_not_finite_fail_their_request_alone():
    scheduler = make()
    bad, good = request(2, 5), request(2, 5)
    scheduler.add(bad)
    scheduler.add(good)
    events = scheduler.commit(scheduler.schedule(), [INVALID_TOKEN, 7])
    assert [event.finish_reason for event in events] == ["error", None] and "not finite" in events[0].error
    assert bad.tokens == [1, 1] and not bad.pages
    drain(scheduler)
    assert good.output == [7] * 5
