"""Calibration on small experts: what is measured, and that calls are what the curve takes them for. No figure is held
against a clock but one that the test drives."""

import math
from itertools import cycle, islice

import pytest
import torch

from hetero_glm5 import hardware
from hetero_glm5.core import UserError
from hetero_glm5.experts import calibrate as calibration
from hetero_glm5.experts.calibrate import TOKENS, Shape, calibrate, costs_here, device_curve, link_bandwidth
from hetero_glm5.placement.profile import Profile
from hetero_glm5.weights.quantize import METHODS, ExpertLayout

SMALL = Shape(256, 128)
MACHINE = hardware.probe(gpu=False)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(calibration, "COLD_BYTES", 2 << 20)
    monkeypatch.setattr(calibration, "LINK_BYTES", 1 << 20)
    monkeypatch.setattr(calibration, "HAND_OVERS", 5)
    monkeypatch.setattr(calibration.hardware, "probe", lambda gpu: MACHINE)  # no device


def sound(curve) -> bool:
    rising = list(curve.seconds) == sorted(curve.seconds)
    return (
        curve.tokens == TOKENS[: len(curve.tokens)] and rising and 0 < curve.seconds[0] < curve.seconds[-1] < math.inf
    )


def test_a_machine_without_a_device(tmp_path):
    told = []
    profile = calibrate(METHODS, threads=1, seconds=0.5 * len(METHODS), shape=SMALL, tell=told.append)
    assert list(profile.host) == list(METHODS) and all(map(sound, profile.host.values()))
    assert told == [f"{method} on the host" for method in METHODS]
    assert (profile.cpu, profile.threads, profile.gpu) == (MACHINE.cpu, 1, None)
    assert profile.device == {} and profile.link is None and 0 < profile.host_call < 1
    profile.save(tmp_path / "machine.json")
    assert Profile.load(tmp_path / "machine.json") == profile


def test_the_device_part_on_another_torch_device():
    assert sound(device_curve(ExpertLayout("INT4", *SMALL), "cpu", 1.0))
    assert link_bandwidth("cpu") > 0


class ClockedLayer:
    """Takes 1 s for each expert and 0.1 s more for each token after the tenth, by the test's own clock."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(calibration.time, "perf_counter", lambda: self.now)

    def __call__(self, x, ids, weights):
        assert x.shape == (len(ids), SMALL.hidden) and weights.shape == ids.shape
        assert (ids == ids[0]).all() and len(set(ids[0].tolist())) == ids.shape[1]
        self.calls.append((len(x), ids[0].tolist()))
        self.now += ids.shape[1] * (1 + 0.1 * max(0, len(x) - 10))
        return x


@pytest.mark.parametrize(("seconds", "last", "most"), [(10_000, 512, 20), (1000, 256, 19), (0, 64, 1)])
def test_a_curve_is_seconds_of_an_expert_in_the_time_there_is(monkeypatch, seconds, last, most):
    layer, layout = ClockedLayer(monkeypatch), ExpertLayout("BF16", *SMALL)
    curve = calibration._curve(layer, layout, 20, seconds, torch.device("cpu"))
    assert curve.tokens[-1] == last
    wanted = [(1 + 0.1 * max(0, n - 10)) / layout.blob_bytes for n in curve.tokens]
    assert curve.seconds == pytest.approx(wanted)
    assert layer.now <= 1.3 * seconds or not seconds
    assert max(len(ids) for _, ids in layer.calls) == most
    asked = [expert for _, ids in layer.calls for expert in ids]
    assert asked == list(islice(cycle(range(20)), len(asked))), "the next ones, which no cache holds"


def test_costs_here(tmp_path, monkeypatch):
    layout = ExpertLayout("INT8", *SMALL)
    monkeypatch.setattr(calibration, "QUICK_SECONDS", 0.3)
    with pytest.raises(UserError, match="without a CUDA device"):
        costs_here(None, layout, threads=1)
    with pytest.raises(UserError, match="is no machine profile"):
        costs_here(tmp_path / "nowhere", layout)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_machine_with_a_device(monkeypatch):
    machine = hardware.Hardware(MACHINE.cpu, MACHINE.numa, MACHINE.ram_available, *_gpu())
    monkeypatch.setattr(calibration.hardware, "probe", lambda gpu: machine)
    profile = calibrate(["INT4"], seconds=2, shape=SMALL)
    assert sound(profile.host["INT4"]) and profile.device["INT4"].tokens and profile.link > 1e9
    assert profile.costs("INT4", 1000).host_call == profile.host_call


def _gpu() -> tuple[str, int]:
    return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
