"""The recorder: what is between a start and a dump, no more and no less, in files that others read."""

import json

import numpy as np
import pytest
import torch

from hetero_glm5.core import RequestError, UserError
from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.placement.record import DistributionRecorder
from hetero_glm5.placement.stats import load_counts

MODEL = ModelConfig.parse(tiny_config())  # 5 layers, the last 3 MoE, of 16 experts, top 4
SHAPE = (3, 16)


def steps(count):
    """(decode, prefill, on_device) for each."""
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 5, SHAPE), rng.integers(0, 90, SHAPE), rng.random(SHAPE) < 0.3) for _ in range(count)]


def read(told):
    return torch.load(told["file"], weights_only=True)


def test_a_dump_holds_what_was_observed_between_start_and_stop(tmp_path):
    recorder = DistributionRecorder(MODEL, str(tmp_path / "new" / "folder"))
    before, *inside, after = steps(6)
    recorder.observe(*before)
    recorder.start()
    for step in inside:
        recorder.observe(*step)
    recorder.stop()
    recorder.observe(*after)
    told = recorder.dump()
    data = read(told)
    want = sum(decode + prefill for decode, prefill, _ in inside)
    assert np.array_equal(data["logical_count"][0, 2:], want) and not data["logical_count"][0, :2].any()
    assert np.array_equal(data["decode_count"][2:], sum(decode for decode, _, _ in inside))
    assert data["logical_count"].dtype == torch.int64
    assert set(data) == {"logical_count", "decode_count", "prefill_count"}
    assert np.array_equal(load_counts(told["file"], MODEL), want), "--init-expert-location takes it"
    assert told["steps"] == 4 and set(told) == {"file", "steps", "tokens"}
    assert told["tokens"]["prefill"] == round(sum(prefill.sum() for _, prefill, _ in inside) / 12)
    assert told["file"].startswith(str(tmp_path / "new" / "folder" / "expert_distribution_recorder_"))


def test_a_dump_starts_from_zero_and_goes_on(tmp_path):
    recorder = DistributionRecorder(MODEL, str(tmp_path))
    first, second, third, fourth = steps(4)
    recorder.start()
    recorder.observe(*first)
    recorder.dump()
    recorder.observe(*second)
    assert np.array_equal(read(recorder.dump())["decode_count"][2:], second[0])
    recorder.observe(*third)
    recorder.stop()
    recorder.start()  # forgets the third
    recorder.observe(*fourth)
    assert np.array_equal(read(recorder.dump())["decode_count"][2:], fourth[0])
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("masks", "kept"), [(1, 1), (3, 3), (9, 5), (-1, 5)])
def test_what_the_device_held(tmp_path, masks, kept):
    recorder = DistributionRecorder(MODEL, str(tmp_path), masks)
    recorder.start()
    observed = steps(5)
    on_device = np.empty(SHAPE, dtype=bool)
    for decode, prefill, held in observed:
        on_device[:] = held  # the same array, as an engine may hand it over
        recorder.observe(decode, prefill, on_device)
    told = recorder.dump()
    data = read(told)
    assert data["gpu_expert_masks"].dtype == torch.bool and not data["gpu_expert_masks"][:, :2].any()
    assert np.array_equal(data["gpu_expert_masks"][:, 2:], np.stack([held for *_, held in observed[-kept:]]))
    assert np.array_equal(data["gpu_decode_count"][2:], sum(decode * held for decode, _, held in observed))
    hits = sum(decode[held].sum() for decode, _, held in observed)
    assert told["hit_rate"]["decode"] == pytest.approx(hits / sum(decode.sum() for decode, _, _ in observed))
    assert 0.2 < told["hit_rate"]["prefill"] < 0.4
    assert json.loads(json.dumps(told)) == told


def test_a_phase_without_tokens_has_no_hit_rate(tmp_path):
    recorder = DistributionRecorder(MODEL, str(tmp_path), 10)
    recorder.start()
    recorder.observe(np.zeros(SHAPE, dtype=np.int64), np.ones(SHAPE, dtype=np.int64), np.ones(SHAPE, dtype=bool))
    assert recorder.dump()["hit_rate"] == {"decode": None, "prefill": 1.0}


def test_what_makes_no_sense_is_refused(tmp_path):
    recorder = DistributionRecorder(MODEL, str(tmp_path))
    with pytest.raises(RequestError, match="nothing to dump: POST /start"):
        recorder.dump()
    with pytest.raises(RequestError, match="not being recorded; POST /start"):
        recorder.stop()
    recorder.start()
    with pytest.raises(RequestError, match="being recorded already"):
        recorder.start()
    with pytest.raises(RequestError, match="no step was computed"):
        recorder.dump()
    assert not list(tmp_path.iterdir())


def test_a_failed_dump_loses_nothing(tmp_path):
    folder = tmp_path / "dumps"
    recorder = DistributionRecorder(MODEL, str(folder))
    recorder.start()
    (step,) = steps(1)
    recorder.observe(*step)
    folder.rmdir()
    with pytest.raises(OSError, match="cannot be written"):
        recorder.dump()
    folder.mkdir()
    assert np.array_equal(read(recorder.dump())["decode_count"][2:], step[0])


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--expert-distribution-recorder-dir .*file.* cannot be made"):
        DistributionRecorder(MODEL, str(tmp_path / "file"))
