"""Whole steps reach the recorder, and only those that begin while it records."""

import numpy as np
import pytest
import torch

from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.experts.counts import RoutingCounts
from hetero_glm5.experts.recording import Recording
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.placement.record import DistributionRecorder

LAYERS, EXPERTS = 3, 16


@pytest.fixture
def recording(tmp_path):
    recorder = DistributionRecorder(ModelConfig.parse(tiny_config()), str(tmp_path), 10)
    return Recording(recorder, RoutingCounts(LAYERS, EXPERTS, "cpu"))


def route(recording, layer, expert, on_device=False):
    recording.routed(layer, torch.full((2, 4), expert), np.full(EXPERTS, on_device))


def test_a_step_that_has_begun_is_not_recorded(recording):
    recording.begin(torch.tensor([True, False]))
    recording.recorder.start()
    route(recording, 0, 5)
    recording.end()
    assert recording.recorder.steps == 0


def test_a_step_that_failed_is_not_recorded(recording):
    recording.recorder.start()
    recording.begin(torch.tensor([True, False]))
    route(recording, 0, 5)
    recording.begin(torch.tensor([True, False]))  # the first one never ended
    for layer in range(LAYERS):
        route(recording, layer, 7, on_device=layer == 1)
    recording.end()
    told = recording.recorder.dump()
    counts = torch.load(told["file"], weights_only=True)["decode_count"]
    assert counts[2:, 7].tolist() == [4] * LAYERS and counts.sum() == 4 * LAYERS
    assert told["steps"] == 1 and told["hit_rate"]["decode"] == pytest.approx(1 / 3)
