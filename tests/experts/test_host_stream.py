"""Host experts on a stream: the stand-in runtime runs seeded schedules, and CUDA's own where there is a device."""

import gc
import random
import threading
import time

import pytest
import torch
from cuda_standin import Stream

from hetero_glm5.experts.cpu_tier import CpuExperts, HostPool
from hetero_glm5.experts.host_stream import CudaStream, HostStream
from hetero_glm5.weights.quantize import pack_experts

EXPERTS, TOPK, SLOTS = 5, 3, HostStream.SLOTS
SHAPES = [("FP32", 24, 17), ("BF16", 40, 24), ("INT8", 130, 33)]  # of the layers that share the pool
MOST_TOKENS = 9
BAD_ID = f"token 0 asks for expert {EXPERTS}"


def layer(pool: HostPool, method: str, hidden: int, intermediate: int) -> CpuExperts:
    g = torch.Generator().manual_seed(hidden)
    gate, up = (torch.randn((EXPERTS, intermediate, hidden), generator=g) for _ in range(2))
    return CpuExperts(
        pack_experts(gate, up, torch.randn((EXPERTS, hidden, intermediate), generator=g), method), pool=pool
    )


def call(experts: CpuExperts, tokens: int, seed: int = 0):
    g = torch.Generator().manual_seed(1000 * seed + tokens)
    x = torch.randn((tokens, experts.packed.layout.hidden), generator=g)
    ids = torch.randint(-1, EXPERTS, (tokens, TOPK), generator=g)
    if seed % 2:
        x, ids = x.to(torch.bfloat16), ids.int()
    return x, ids, torch.rand((tokens, TOPK), generator=g)


def bad_call(experts: CpuExperts, tokens: int = 2):
    x, ids, weights = call(experts, tokens)
    ids[0, 1] = EXPERTS
    return x, ids, weights


@pytest.fixture(scope="module")
def layers():
    pool = HostPool(2)
    yield [layer(pool, *shape) for shape in SHAPES]
    pool.close()


@pytest.fixture(scope="module")
def calls(layers):
    """(experts, x, ids, weights, y): what schedules are made of, with the right answers."""
    some = [(e, *call(e, tokens, seed)) for e in layers for tokens in range(1, MOST_TOKENS + 1) for seed in range(2)]
    return [(e, *inputs, e(*inputs)) for e, *inputs in some]


@pytest.fixture
def own(standin):
    """A stream, and a layer whose pool nobody else has."""
    stream, experts = Stream(standin), layer(HostPool(2), "FP32", 24, 17)
    yield stream, experts
    stream.hold(False)
    stream.synchronize()
    destroy([stream], experts.pool)


def destroy(streams: list[Stream], pool: HostPool) -> None:
    pool._streams.clear()
    for stream in streams:
        stream.destroy()


def test_pinned_bytes_are_what_the_slots_take(own):
    stream, experts = own
    for number in range(SLOTS):
        experts.start(stream, *call(experts, MOST_TOKENS))()
        hidden, held = experts.packed.layout.hidden, experts.pool._streams[stream.device, stream.handle]._memory
        each = HostStream.pinned_bytes(MOST_TOKENS, hidden, TOPK, itemsize=4) // SLOTS
        assert [memory.nbytes for memory in held] == [each] * (number + 1) + [0] * (SLOTS - number - 1)


def run_schedule(streams: list[Stream], calls, seed: int) -> int:
    """Starts and joins random calls on random streams, some of which are never joined; -> the number of right results.
    Errors come out of a start or of the check after the synchronisation, and no other call is touched."""
    choose, pool = random.Random(seed), calls[0][0].pool
    open_calls = {stream: {} for stream in streams}  # by number
    results, wrong, raised = [], 0, 0
    for number in range(choose.randrange(4, 20)):
        stream = choose.choice(streams)
        pending = open_calls[stream]
        if pending and choose.random() < 0.5:
            join, y = pending.pop(choose.choice(list(pending)))
            if y is None or choose.random() < 0.9:
                results.append((join(), y))
            continue
        if pending and min(pending) <= number - SLOTS:  # its slot may be the next
            join, y = pending.pop(min(pending))
            results.append((join(), y))
        experts, *inputs, y = choose.choice(calls)
        if seed % 4 == 0 and choose.random() < 0.1:
            inputs, y, wrong = bad_call(experts), None, wrong + 1
        try:
            pending[number] = experts.start(stream, *inputs), y
        except ValueError as error:
            assert BAD_ID in str(error)
            raised += 1
            pending.clear()  # they have ended without a result
    for stream in streams:
        results += [(join(), y) for join, y in open_calls[stream].values()]
    for stream in streams:
        assert stream.synchronize() == 0
    for _ in streams:
        try:
            pool.check()
        except ValueError as error:
            assert BAD_ID in str(error)
            raised += 1
    pool.check()
    assert bool(raised) == bool(wrong) and raised <= wrong
    for got, y in results:
        assert got.isnan().all() if y is None else torch.equal(got, y)
    return len(results)


def run_schedules(standin, calls, count: int, first: int = 0) -> None:
    right = 0
    for crowd in range(8):  # streams live long, as a device's do
        options = {"most_delay": (0, 30, 100, 300)[crowd % 4], "one_by_one": crowd >= 4}
        streams = [Stream(standin, seed=first + 10 * crowd + i, **options) for i in range(1 + crowd % 3)]
        for seed in range(count // 8):
            right += run_schedule(streams, calls, first + 1000 * crowd + seed)
        destroy(streams, calls[0][0].pool)
    assert right > 3 * count


def test_schedules(standin, calls):
    run_schedules(standin, calls, 400)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100_000, 500_000, 100_000))
def test_thousands_of_schedules(standin, calls, first):
    run_schedules(standin, calls, 4000, first)


def test_a_stream_each_for_several_threads(standin, layers, calls):
    streams = [Stream(standin, seed=i, most_delay=50) for i in range(3)]
    wrong = []

    def drive(stream):
        results = []
        for experts, *inputs, y in calls:
            results.append((experts.start(stream, *inputs)(), y))
        stream.synchronize()
        wrong.extend(y for got, y in results if not torch.equal(got, y))

    for stream in streams:
        layers[0].pool.stream(stream)
    threads = [threading.Thread(target=drive, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    destroy(streams, layers[0].pool)


def test_the_caller_is_held_back_by_the_slots_and_by_nothing_else(own):
    stream, experts = own
    stream.hold(True)
    started = []

    def start_all():
        for i in range(2 * SLOTS):
            started.append((experts.start(stream, *call(experts, 3, seed=2 * i))(), 2 * i))

    caller = threading.Thread(target=start_all)
    caller.start()
    while len(started) < SLOTS:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(started) == SLOTS and caller.is_alive()
    stream.hold(False)
    caller.join()
    stream.synchronize()
    for y, seed in started:
        assert torch.equal(y, experts(*call(experts, 3, seed=seed)))


def test_buffers_grow_while_earlier_calls_are_on_their_way(own):
    stream, experts = own
    inputs = [call(experts, tokens, seed=2) for tokens in (1, 2, 40, 1, 41, 300, 0, 300, 3, 900)]
    results = []
    for some in inputs:
        results.append(experts.start(stream, *some)())
        gc.collect()
    stream.synchronize()
    for got, some in zip(results, inputs, strict=True):
        assert torch.equal(got, experts(*some))


def test_calls_may_overlap_and_be_joined_in_any_order(own):
    stream, experts = own
    joins = [experts.start(stream, *call(experts, 5, seed=2 * i)) for i in range(SLOTS)]
    results = [join() for join in reversed(joins)]
    stream.synchronize()
    for i, got in enumerate(reversed(results)):
        assert torch.equal(got, experts(*call(experts, 5, seed=2 * i)))


def test_a_call_that_is_not_joined_gives_its_slot_to_a_later_one(own):
    stream, experts = own
    first = experts.start(stream, *call(experts, 3))
    for _ in range(SLOTS):
        experts.start(stream, *call(experts, 4))
    with pytest.raises(ValueError, match="its slot went to a later call; each call is waited for once"):
        first()
    last = experts.start(stream, *call(experts, 3))
    y = last()
    with pytest.raises(ValueError, match="has been waited for"):
        last()
    stream.synchronize()
    assert torch.equal(y, experts(*call(experts, 3)))


def test_an_error_poisons_its_rows_and_comes_out_of_check_once(own):
    stream, experts = own
    stream.hold(True)  # or the second start may tell
    bad, good = (experts.start(stream, *some)() for some in (bad_call(experts), call(experts, 3)))
    stream.hold(False)
    stream.synchronize()
    assert bad.isnan().all() and torch.equal(good, experts(*call(experts, 3)))
    with pytest.raises(ValueError, match=BAD_ID):
        experts.pool.check()
    experts.pool.check()
    again = experts.start(stream, *call(experts, 3))()
    stream.synchronize()
    assert torch.equal(again, good)


def test_the_errors_of_a_step_come_out_as_one(own):
    """Whoever does not synchronise hears of the first one when it wants its slot."""
    stream, experts = own
    with pytest.raises(ValueError, match=BAD_ID):
        for _ in range(SLOTS + 1):
            experts.start(stream, *bad_call(experts))()
    stream.synchronize()
    experts.pool.check()


def test_an_error_takes_those_still_on_their_way_with_it(standin):
    stream, experts = Stream(standin, seed=1, most_delay=20_000), layer(HostPool(2), "FP32", 24, 17)
    for _ in range(SLOTS):
        experts.start(stream, *bad_call(experts))()
    with pytest.raises(ValueError, match=BAD_ID):
        while True:  # until the stream is past the first
            experts.pool.check()
    stream.synchronize()
    experts.pool.check()
    destroy([stream], experts.pool)


def test_close_waits_for_the_stream(own):
    stream, experts = own
    stream.hold(True)
    y = experts.start(stream, *call(experts, 3))()
    unjoined = experts.start(stream, *call(experts, 3))
    threading.Timer(0.05, stream.hold, (False,)).start()
    want = experts(*call(experts, 3))
    experts.pool.close()
    stream.synchronize()
    assert torch.equal(y, want)
    with pytest.raises(ValueError, match="closed"):
        experts.start(stream, *call(experts, 3))
    with pytest.raises(ValueError, match="has been waited for"):
        unjoined()
    experts.pool.close()


def test_a_pool_that_is_dropped_waits_for_the_stream(standin):
    stream, experts = Stream(standin), layer(HostPool(2), "FP32", 24, 17)
    want = experts(*call(experts, 3))
    stream.hold(True)
    y = experts.start(stream, *call(experts, 3))()
    threading.Timer(0.05, stream.hold, (False,)).start()
    del experts
    gc.collect()
    stream.synchronize()
    assert torch.equal(y, want)
    stream.destroy()


FAILED = r"CUDA error 719 \(cudaErrorLaunchFailure\)"


def test_a_failed_device_is_told_and_nobody_waits_for_it(own):
    stream, experts = own
    stream.hold(True)
    joins = [experts.start(stream, *call(experts, 3)) for _ in range(SLOTS)]
    joins[0]()
    stream.fail()
    stream.hold(False)
    with pytest.raises(RuntimeError, match=FAILED):
        joins[1]()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=FAILED):
            experts.start(stream, *call(experts, 3))
    with pytest.raises(RuntimeError, match=FAILED):
        experts.pool.close()
    with pytest.raises(ValueError, match="closed"):
        experts(*call(experts, 3))


def test_a_refused_submit_leaves_the_slot_free(own):
    stream, experts = own
    stream.fail()
    with pytest.raises(RuntimeError, match=f"{FAILED} from cudaLaunchHostFunc"):
        experts.start(stream, *call(experts, 3))
    stream.fail(0)
    results = [experts.start(stream, *call(experts, 3))() for _ in range(SLOTS)]
    stream.synchronize()
    assert all(torch.equal(y, experts(*call(experts, 3))) for y in results)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, ids, weights: (x[:, :-1].contiguous(), ids, weights), r"x has shape \[3, 23\], must be \[3, 24\]"),
        (lambda x, ids, weights: (x[0], ids, weights), r"of shape \[24\]"),
        (lambda x, ids, weights: (x.half(), ids, weights), "x is torch.float16"),
        (lambda x, ids, weights: (x, ids[:2], weights), r"topk_ids has shape \[2, 3\], must be \[3, \*\]"),
        (lambda x, ids, weights: (x, ids, weights.double()), "topk_weights holds elements of type float64"),
    ],
)
def test_bad_input_is_refused_when_it_is_enqueued(own, change, sentence):
    stream, experts = own
    for _ in range(SLOTS + 1):
        with pytest.raises(ValueError, match=sentence):
            experts.start(stream, *change(*call(experts, 3)))
    y = experts.start(stream, *call(experts, 3))()
    stream.synchronize()
    assert torch.equal(y, experts(*call(experts, 3)))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestCuda:
    DEVICE = torch.device("cuda")

    def start(self, experts, inputs):
        return experts.start(CudaStream(self.DEVICE), *(t.to(self.DEVICE, non_blocking=True) for t in inputs))

    def test_calls_in_a_row(self, calls):
        for _ in range(5):
            results = [(self.start(experts, inputs)(), y) for experts, *inputs, y in calls]
            torch.cuda.synchronize()
            calls[0][0].pool.check()
            assert all(torch.equal(got.cpu(), y) for got, y in results)

    def test_several_streams(self, calls):
        streams = [torch.cuda.Stream() for _ in range(3)]
        results = []
        for i, (experts, *inputs, y) in enumerate(calls):
            with torch.cuda.stream(streams[i % 3]):
                results.append((self.start(experts, inputs)(), y))
        torch.cuda.synchronize()
        assert all(torch.equal(got.cpu(), y) for got, y in results)

    def test_an_error(self, layers):
        y = self.start(layers[0], bad_call(layers[0]))()
        torch.cuda.synchronize()
        assert y.isnan().all()
        with pytest.raises(ValueError, match=BAD_ID):
            layers[0].pool.check()
