"""The engine's thread: accepting, delivering, failing, watching, stopping."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from hetero_glm5.core import Grammar, QueueFull, RequestError, SamplingParams, UserError
from hetero_glm5.server.errors import GenerationFailed, NotReady
from hetero_glm5.server.worker import MAX_FAILURES, EngineWorker

PARAMS = SamplingParams(max_tokens=5)


async def started(engine, **options) -> EngineWorker:
    ready = asyncio.Event()
    options = {"watchdog_timeout": 60, "on_ready": ready.set, "on_failure": ready.set} | options
    worker = EngineWorker(engine if callable(engine) else lambda progress: engine, **options)
    worker.start()
    await asyncio.wait_for(ready.wait(), 10)
    return worker


async def text_of(worker, prompt, params=PARAMS) -> str:
    generation = await worker.submit([prompt], params)
    try:
        return "".join([item[1].text async for item in generation.events() if item])
    finally:
        worker.close(generation)


def test_fifty_streams_lose_and_double_nothing(fake_engine):
    async def main():
        engine = fake_engine()
        worker = await started(engine)
        params = SamplingParams(max_tokens=100)
        texts = await asyncio.gather(*(text_of(worker, [0] * n, params) for n in range(1, 51)))
        assert texts == ["".join(engine.answer([0] * n)[:100]) for n in range(1, 51)]
        assert worker.num_open == 0
        await worker.stop()
        assert engine.closed

    asyncio.run(main())


def test_several_prompts_are_accepted_together_or_not_at_all(fake_engine):
    async def main():
        engine = fake_engine(most_waiting=2)
        worker = await started(engine)
        generation = await worker.submit([[1], [1, 2]], PARAMS)
        got = ["", ""]
        async for item in generation.events():
            if item:
                got[item[0]] += item[1].text
        assert got == ["".join(engine.answer(p)[:5]) for p in ([1], [1, 2])]
        with pytest.raises(QueueFull):
            await worker.submit([[1], [1], [1]], PARAMS)
        assert len(engine.aborted) == 2
        with pytest.raises(RequestError):
            await worker.submit([[1] * 2000], PARAMS)
        await worker.stop()

    asyncio.run(main())


def test_closing_aborts(fake_engine):
    async def main():
        engine = fake_engine(lambda prompt: ["x"] * 1_000_000)
        worker = await started(engine)
        generation = await worker.submit([[1]], SamplingParams())
        async for _ in generation.events():
            break
        worker.close(generation)
        await worker.stop()  # would last long otherwise
        assert len(engine.aborted) == 1

    asyncio.run(main())


def test_a_failing_step_fails_its_requests_and_serves_on(fake_engine, caplog):
    async def main():
        engine = fake_engine()

        def fail():
            raise ValueError("no luck")

        worker = await started(engine)
        engine.before_step = fail
        both = await asyncio.gather(text_of(worker, [1]), text_of(worker, [2]), return_exceptions=True)
        assert [type(e) for e in both] == [GenerationFailed] * 2
        assert "ValueError: no luck" in str(both[0])
        engine.before_step = lambda: None
        assert await text_of(worker, [1]) == "".join(engine.answer([1])[:5])
        await worker.stop()

    asyncio.run(main())


def test_steps_that_keep_failing_end_the_worker(fake_engine):
    """A device that is lost fails every step, the probe's too: a server that goes on saying ok would be worse."""

    async def main():
        engine = fake_engine()

        def lost():
            raise RuntimeError("device lost")

        failed = asyncio.Event()
        worker = await started(engine, on_failure=failed.set)
        engine.before_step = lost
        for _ in range(MAX_FAILURES):
            with pytest.raises(GenerationFailed, match="while computing this request: RuntimeError: device lost"):
                await text_of(worker, [1])
        await asyncio.wait_for(failed.wait(), 5)
        assert (worker.state, worker.failure) == ("failed", "The engine ended: RuntimeError: device lost")

    asyncio.run(main())


@pytest.mark.parametrize("healthy_between", [True, False])
def test_a_request_that_always_fails_its_step_does_not_end_the_worker(fake_engine, healthy_between, caplog):
    bad = [66]

    async def main():
        engine = fake_engine()

        def fail_bad():
            if any(seq.tokens[: seq.num_prompt] == bad for seq in engine.running):
                raise ValueError("no luck")

        worker = await started(engine)
        engine.before_step = fail_bad
        for _ in range(3 * MAX_FAILURES):
            together = await asyncio.gather(*(text_of(worker, bad) for _ in range(2)), return_exceptions=True)
            assert [type(error) for error in together] == [GenerationFailed] * 2
            if healthy_between:
                assert await text_of(worker, [1]) == "".join(engine.answer([1])[:5])
        assert await text_of(worker, [1]) == "".join(engine.answer([1])[:5])
        assert worker.state == "ready" and not engine.running
        await worker.stop()

    asyncio.run(main())
    assert ("the device works" in caplog.text) is not healthy_between


def test_a_step_that_fails_without_a_request_to_blame_ends_the_worker(fake_engine):
    async def main():
        engine = fake_engine()

        def fail():
            raise ValueError("no luck")

        failed = asyncio.Event()
        worker = await started(engine, on_failure=failed.set)
        engine.before_step, engine.fail_step = fail, lambda message: []
        with pytest.raises(GenerationFailed, match="The engine ended: ValueError: no luck"):
            await text_of(worker, [1])
        await asyncio.wait_for(failed.wait(), 5)

    asyncio.run(main())


def test_stopping_does_not_wait_for_an_engine_that_hangs(fake_engine):
    async def main():
        engine, entered, release = fake_engine(), threading.Event(), threading.Event()
        worker = await started(engine, watchdog_timeout=0.3)
        engine.before_step = lambda: (entered.set(), release.wait(10))
        generation = await worker.submit([[1]], PARAMS)
        await asyncio.to_thread(entered.wait, 5)
        worker.close(generation)
        await asyncio.wait_for(worker.stop(), 5)
        assert worker.state == "failed"
        release.set()

    asyncio.run(main())


def test_an_engine_that_cannot_abort_ends_the_worker(fake_engine):
    async def main():
        engine = fake_engine()

        def broken(*args):
            raise ValueError("broken")

        failed = asyncio.Event()
        worker = await started(engine, on_failure=failed.set)
        engine.before_step = engine.abort = broken
        with pytest.raises(GenerationFailed, match="The engine ended: ValueError: broken"):
            await text_of(worker, [1])
        await asyncio.wait_for(failed.wait(), 5)
        with pytest.raises(NotReady):
            await worker.submit([[1]], PARAMS)

    asyncio.run(main())


@pytest.mark.parametrize(
    "error, sentence",
    [(UserError("No such folder."), "No such folder."), (MemoryError("x"), "Loading failed: MemoryError: x")],
)
def test_a_failing_load_is_one_sentence(error, sentence):
    def load(progress):
        raise error

    async def main():
        worker = await started(load)
        assert (worker.state, worker.failure) == ("failed", sentence)
        with pytest.raises(NotReady):
            await worker.submit([[1]], PARAMS)

    asyncio.run(main())


def test_progress_is_seen_while_loading(fake_engine, halfway):
    go = threading.Event()

    def load(progress):
        progress(halfway)
        go.wait(10)
        return fake_engine()

    async def main():
        seen = asyncio.Event()
        loop = asyncio.get_running_loop()
        worker = EngineWorker(load, watchdog_timeout=9, on_progress=lambda p: loop.call_soon_threadsafe(seen.set))
        worker.start()
        await asyncio.wait_for(seen.wait(), 5)
        assert (worker.state, worker.progress) == ("loading", halfway)
        go.set()
        while worker.state == "loading":
            await asyncio.sleep(0.01)
        assert worker.context_length == 1000
        await worker.stop()

    asyncio.run(main())


def test_watchdog_trips_on_a_stuck_step_only(fake_engine, capfd):
    async def main():
        engine, release = fake_engine(), threading.Event()
        failed = asyncio.Event()
        worker = await started(engine, watchdog_timeout=0.2, on_failure=failed.set)
        engine.before_step = lambda: time.sleep(0.1)  # slow, but going on
        assert await text_of(worker, [1])
        await asyncio.sleep(0.3)  # idle is no lack of progress
        assert worker.state == "ready"
        engine.before_step = lambda: release.wait(10)
        with pytest.raises(GenerationFailed, match="finished no step for 0.2 s"):
            await text_of(worker, [1])
        await asyncio.wait_for(failed.wait(), 5)
        assert worker.state == "failed"
        release.set()
        return worker

    asyncio.run(main())
    assert 'File "' in capfd.readouterr().err, "the stacks are dumped"


def test_a_refusal_after_the_patience_comes_with_the_events(fake_engine):
    async def main():
        engine, entered, hold = fake_engine(), threading.Event(), threading.Event()
        worker = await started(engine)
        engine.before_step = lambda: (entered.set(), hold.wait(10))
        first = await worker.submit([[1]], PARAMS)
        await asyncio.to_thread(entered.wait, 10)
        late = await worker.submit([[1] * 2000], PARAMS, patience=0.05)
        hold.set()
        with pytest.raises(RequestError):
            async for _ in late.events():
                pass
        worker.close(late)
        worker.close(first)
        await worker.stop()

    asyncio.run(main())


def test_grammars_are_compiled_while_others_are_served(fake_engine):
    async def main():
        engine, hold = fake_engine(), threading.Event()
        engine.before_compiling = lambda grammar: hold.wait(10)
        worker = await started(engine)
        params = SamplingParams(max_tokens=5, grammar=Grammar("regex", "a"))
        closed, aborted, kept, last = [
            await worker.submit([[n]], params, patience=0.02, names=frozenset({str(n)})) for n in range(4)
        ]
        assert await text_of(worker, [1]) == "".join(engine.answer([1])[:5])
        worker.close(closed)
        assert worker.abort("1") == 1
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0.02)
        assert worker.state == "ready" and len(engine.params) == 1, "no grammar is compiled yet"
        hold.set()
        assert [item[1].finish_reason async for item in aborted.events() if item][-1] == "abort"
        for generation in (kept, last):
            assert len([item async for item in generation.events() if item]) == 5
        await stopping
        assert engine.closed and not engine.running and len(engine.aborted) == 2

    asyncio.run(main())


def test_what_is_closed_is_not_compiled(fake_engine):
    async def main():
        engine, hold, compiled = fake_engine(), threading.Event(), []
        engine.before_compiling = lambda grammar: (compiled.append(grammar.text), hold.wait(10))
        worker = await started(engine)
        submitted = [
            await worker.submit([[1]], SamplingParams(grammar=Grammar("regex", text)), patience=0.01) for text in "abcd"
        ]
        for generation in submitted:
            worker.close(generation)
        hold.set()
        assert await text_of(worker, [1], SamplingParams(max_tokens=5, grammar=Grammar("regex", "e")))
        assert compiled == ["a", "e"] and len(engine.params) <= 2
        await worker.stop()
        assert not engine.running

    asyncio.run(main())


def test_grammars_to_be_compiled_are_limited(fake_engine):
    async def main():
        engine, hold = fake_engine(), threading.Event()
        engine.config = SimpleNamespace(max_queued_requests=2)
        engine.before_compiling = lambda grammar: hold.wait(10)
        worker = await started(engine)
        params = SamplingParams(max_tokens=5, grammar=Grammar("regex", "a"))
        both = [await worker.submit([[1]], params, patience=0.01) for _ in range(2)]
        with pytest.raises(QueueFull, match="the grammars of 2 requests are to be compiled"):
            await worker.submit([[1]], params)
        assert await text_of(worker, [1]), "without a grammar"
        hold.set()
        for generation in both:
            assert len([item async for item in generation.events() if item]) == 5
        assert await text_of(worker, [1], params) and worker.num_open == 2
        await worker.stop()

    asyncio.run(main())


def test_a_grammar_that_cannot_be_compiled_is_its_requests_alone(fake_engine):
    def fail(grammar):
        raise RequestError("no grammar", "grammar") if grammar.text == "a" else MemoryError("x")

    async def main():
        engine = fake_engine()
        engine.before_compiling = fail
        worker = await started(engine)
        for text, error, words in (("a", RequestError, "^no grammar$"), ("b", GenerationFailed, "MemoryError: x")):
            with pytest.raises(error, match=words):
                await text_of(worker, [1], SamplingParams(grammar=Grammar("regex", text)))
        assert await text_of(worker, [1]) and worker.num_open == 0
        await worker.stop()

    asyncio.run(main())


def test_questions_are_answered_between_steps(fake_engine):
    async def main():
        engine, inside = fake_engine(lambda prompt: ["x"] * 1_000_000), threading.Event()

        def step():
            inside.set()
            time.sleep(0.002)
            inside.clear()

        engine.before_step = step
        worker = await started(engine)
        generation = await worker.submit([[1]], SamplingParams())
        for number in range(20):
            answer = await worker.ask(
                lambda engine, number=number: (number, inside.is_set(), threading.current_thread().name)
            )
            assert answer == (number, False, "engine")
        worker.close(generation)
        await worker.stop()

    asyncio.run(main())


def test_what_a_question_raises_is_the_askers(fake_engine):
    def fail(error):
        def question(engine):
            raise error

        return question

    async def main():
        worker = await started(fake_engine())
        with pytest.raises(RequestError, match="^not now$"):
            await worker.ask(fail(RequestError("not now")))
        with pytest.raises(GenerationFailed, match="The engine failed: OSError: disk full"):
            await worker.ask(fail(OSError("disk full")))
        assert await text_of(worker, [1])
        await worker.stop()

    asyncio.run(main())


def test_an_asker_may_leave_and_an_engine_may_hang(fake_engine):
    async def main():
        engine, entered, release = fake_engine(), threading.Event(), threading.Event()
        with pytest.raises(NotReady):
            await EngineWorker(lambda progress: engine, watchdog_timeout=9).ask(lambda engine: 1)
        worker = await started(engine, watchdog_timeout=0.3)
        engine.before_step = lambda: (entered.set(), release.wait(10))
        generation = await worker.submit([[1]], PARAMS)
        await asyncio.to_thread(entered.wait, 5)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(worker.ask(lambda engine: 1), 0.01)
        with pytest.raises(GenerationFailed, match="finished no step"):
            await worker.ask(lambda engine: 1)
        worker.close(generation)
        release.set()

    asyncio.run(main())


def test_what_is_aborted_by_name_ends_and_says_so(fake_engine):
    async def main():
        engine = fake_engine(lambda prompt: ["x"] * 1_000_000)
        worker = await started(engine)
        submitted = [
            await worker.submit([[1], [2]], SamplingParams(), names=frozenset(names), salt="s")
            for names in ({"a", "A"}, {"b"}, {"c"})
        ]
        assert worker.abort("nobody") == 0 and worker.abort("A") == 1
        reasons = [item[1].finish_reason async for item in submitted[0].events() if item and item[1].finish_reason]
        assert reasons == ["abort"] * 2 and len(engine.aborted) == 2 and len(engine.running) == 4
        assert worker.abort("a") == 0, "it has ended"
        assert worker.abort(None) == 2
        for generation in submitted[1:]:
            assert [i[1].finish_reason async for i in generation.events() if i and i[1].finish_reason] == ["abort"] * 2
        assert engine.salts == ["s"] * 6 and not engine.running
        await worker.stop()

    asyncio.run(main())


def test_events_are_observed_and_timed(fake_engine):
    async def main():
        worker = await started(fake_engine())
        seen = []
        worker.observe = lambda generation, index, event: seen.append((generation, index, event.token))
        generation = await worker.submit([[1], [2]], PARAMS)
        assert len([item async for item in generation.events() if item]) == len(seen) == 10
        assert seen[:2] == [(generation, 0, 1), (generation, 1, 1)]
        assert generation.submitted <= generation.first < generation.last <= time.monotonic()
        await worker.stop()

    asyncio.run(main())
