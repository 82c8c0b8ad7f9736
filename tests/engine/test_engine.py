from dataclasses import replace

import numpy as np
import pytest
import torch
from cheap_link import weigh_by
from oracle import random_ids
from tiny import tiny_checkpoint

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import QueueFull, RequestError, SamplingParams
from hetero_glm5.engine.engine import Engine
from hetero_glm5.flags import ConfigError
from hetero_glm5.llm import LLM
from hetero_glm5.quality.tracing import record

FOUR = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture
def engine(checkpoints):
    folder = str(tiny_checkpoint(checkpoints))
    engine = Engine.load(EngineConfig(model=folder, device="cpu", max_running_requests=1, max_total_tokens=256))
    yield engine
    engine.close()


def drain(engine: Engine):
    events = []
    while engine.busy:
        events += engine.step()
    return events


def test_a_step_that_fails_ends_its_own_sequences_only(engine):
    running, waiting = engine.add([1, 2, 3], FOUR), engine.add([4, 5], FOUR)
    engine.step()
    forward, engine.runner.forward = engine.runner.forward, lambda batch, clock: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.step()
    events = engine.fail_step("no luck")
    assert [(event.seq, event.finish_reason, event.error) for event in events] == [(running, "error", "no luck")]
    engine.runner.forward = forward
    drain(engine)
    assert waiting.finish_reason == "length" and len(waiting.output) == 4
    assert engine.scheduler.cache.num_available == engine.scheduler.cache.pool.num_pages


def test_aborts_are_final_wherever_the_sequence_is(engine):
    running, waiting, last = (engine.add([1, 2, 3], FOUR) for _ in range(3))
    engine.step()
    for seq in (running, waiting, running):
        engine.abort(seq)
    events = drain(engine)
    assert {event.seq for event in events} == {last} and last.finish_reason == "length"
    assert running.finish_reason == waiting.finish_reason == "abort"
    assert engine.scheduler.cache.num_available == engine.scheduler.cache.pool.num_pages


def test_an_idle_engine_steps_for_nothing(engine):
    assert not engine.busy and engine.step() == []


def test_moving_needs_a_slot(checkpoints):
    flags = {"kt_enable_dynamic_expert_update": True, "kt_gpu_experts_ratio": 0.0001}
    with pytest.raises(ConfigError, match="there are none. Raise --kt-num-gpu-experts"):
        Engine.load(EngineConfig(model=str(tiny_checkpoint(checkpoints)), device="cpu", **flags))


def test_the_report_counts_what_moving_experts_takes(checkpoints, caplog):
    moves = {"kt_num_gpu_experts": 2, "kt_enable_dynamic_expert_update": True, "kt_gpu_prefill_token_threshold": "64"}
    config = EngineConfig(model=str(tiny_checkpoint(checkpoints)), device="cpu", max_total_tokens=256, **moves)
    with caplog.at_level("INFO"):
        Engine.load(config).close()
    assert "6 device experts" in caplog.text and "2 staging slots" in caplog.text
    assert "host tier: 48 experts" in caplog.text and "6 of them on the device too" in caplog.text


@pytest.mark.parametrize(("held", "moving"), [(0, False), (4, False), (4, True)])
def test_a_dump_counts_what_a_trace_holds(checkpoints, tmp_path, monkeypatch, held, moving):
    weigh_by(monkeypatch)
    prompts = [random_ids(length, seed=length) for length in (20, 9, 33)]
    flags = {"record_kt_gpu_expert_distribution": True, "expert_distribution_recorder_dir": str(tmp_path)}
    flags |= {"max_running_requests": 2, "chunked_prefill_size": 7, "kt_num_gpu_experts": held}
    flags |= {"kt_enable_dynamic_expert_update": moving}
    with LLM(tiny_checkpoint(checkpoints), device="cpu", skip_tokenizer=True, **flags) as llm:
        recorder = llm.engine.recorder
        llm.generate(prompts, FOUR)
        recorder.start()
        trace = record(llm, ["a"] * 3, prompts, FOUR)
        recorder.stop()
        llm.generate(prompts, FOUR)
        told = recorder.dump()
    data = {name: tensor.numpy() for name, tensor in torch.load(told["file"], weights_only=True).items()}
    masks = data["gpu_expert_masks"][:, 2:]
    assert told["steps"] == trace.step[-1] + 1 == len(masks)
    assert (masks.sum((1, 2)) <= 3 * held).all() and (len(np.unique(masks, axis=0)) > 1) == moving
    for phase, rows in (("decode", trace.decode), ("prefill", ~trace.decode)):
        counts = np.zeros(masks.shape, dtype=np.int64)  # by step
        for step, row in zip(trace.step[rows], trace.ids[rows], strict=True):
            np.add.at(counts[step], (np.arange(3)[:, None], row), 1)
        assert np.array_equal(data[f"{phase}_count"][2:], counts.sum(0))
        assert np.array_equal(data[f"gpu_{phase}_count"][2:], (counts * masks).sum(0))
        assert told["tokens"][phase] == rows.sum() > 0
        assert told["hit_rate"][phase] == pytest.approx((counts * masks).sum() / counts.sum())


def test_a_request_that_is_refused_leaves_nothing(engine):
    for _ in range(engine.config.max_queued_requests):
        engine.add([1], FOUR)
    with pytest.raises(QueueFull):
        engine.add([1], FOUR)
    assert len(engine.sampler._shaping) == engine.num_waiting == engine.config.max_queued_requests
    with pytest.raises(RequestError, match="n is 64; at most 3 can wait"):
        engine.config = replace(engine.config, max_queued_requests=3)
        engine.add_all([1], replace(FOUR, n=64))


def test_a_deadline_is_told_also_when_the_step_fails(engine):
    late, other = engine.add([1, 2, 3], FOUR, timeout=0.0), engine.add([4, 5], FOUR)
    engine.runner.forward = lambda batch, clock: 1 / 0
    (event,) = engine.step()
    assert event.seq is late and "deadline has passed" in event.error
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert [event.seq for event in engine.fail_step("no luck")] == [other]


def test_an_interrupted_call_leaves_no_page_that_was_not_filled(checkpoints, monkeypatch):
    folder, prompt = tiny_checkpoint(checkpoints), random_ids(40, seed=5)
    flags = {"max_total_tokens": 64, "page_size": 8, "kv_host_size": 0.01, "dtype": "float32"}
    with LLM(folder, device="cpu", skip_tokenizer=True, **flags) as llm:
        want = llm.generate(prompt, FOUR)[0].token_ids
        llm.generate(random_ids(60, seed=6), FOUR)  # the pool forgets the prompt, the host does not
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.runner, "forward", lambda batch, clock: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                llm.generate(prompt, FOUR)
        again = llm.generate(prompt, FOUR)[0]
        assert again.num_cached >= 32 and again.token_ids == want
