import json
from dataclasses import replace

import numpy as np
import pytest

from hetero_glm5.core import UserError
from hetero_glm5.placement.cost import Curve
from hetero_glm5.placement.profile import Profile

CURVE = Curve((1.0, 8.0, 64.0), (2.5e-12, 2.5e-12, 8e-12))
PROFILE = Profile(
    cpu="a processor",
    isa="avx512",
    threads=16,
    gpu="a device",
    versions={"hetero_glm5": "0.1.0", "torch": "2"},
    host={"INT4": CURVE, "FP8": Curve((1.0,), (3e-12,))},
    device={"INT4": Curve((1.0,), (1e-12,))},
    link=50e9,
    host_call=30e-6,
)


def test_what_is_saved_is_loaded(tmp_path):
    for profile in (PROFILE, replace(PROFILE, gpu=None, device={}, link=None)):
        profile.save(tmp_path / "machine.json")
        assert Profile.load(tmp_path / "machine.json") == profile


def test_costs_are_the_profiles_for_experts_of_any_size():
    costs = PROFILE.costs("INT4", 10_000_000)
    assert (costs.expert, costs.link, costs.host_call) == (10_000_000, 50e9, 30e-6)
    assert np.allclose(costs.on_host(np.array([0, 1, 36, 128])), [0, 25e-6, 52.5e-6, 160e-6])
    assert np.allclose(costs.on_device(np.array([1])), 10e-6)


@pytest.mark.parametrize(
    ("profile", "method", "sentence"),
    [
        (PROFILE, "BF16", "has no BF16 on the host, only INT4, FP8. Measure it: .* --methods BF16"),
        (PROFILE, "FP8", "has no FP8 on the device, only INT4"),
        (replace(PROFILE, gpu=None, device={}, link=None), "INT4", "without a CUDA device, so it knows no link"),
    ],
)
def test_what_was_not_measured_is_refused(profile, method, sentence):
    with pytest.raises(UserError, match=sentence):
        profile.costs(method, 1000)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"speed": 3},
        {"host": {}},
        {"host": []},
        {"host": {"INT4": {"tokens": [1], "seconds": [1, 2]}}},
        {"host": {"INT4": {"tokens": [2, 1], "seconds": [1, 2]}}},
        {"host": {"INT4": {"tokens": [], "seconds": []}}},
        {"host": {"INT4": {"tokens": [1], "seconds": [-1.0]}}},
        {"host": {"INT4": {"tokens": [1], "seconds": [True]}}},
        {"host": {"INT4": {"tokens": [1]}}},
        {"host": {"INT4": 3}},
        {"device": {}},
        {"link": None},
        {"link": 0},
        {"link": float("inf")},
        {"link": "fast"},
        {"host_call": None},
        {"host_call": float("nan")},
        {"threads": 2.5},
        {"cpu": None},
        {"gpu": 7},
        {"versions": {"torch": 2}},
        {"versions": "2"},
    ],
    ids=str,
)
def test_damaged_profiles_are_refused(tmp_path, change):
    file = tmp_path / "machine.json"
    PROFILE.save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"machine.json.* Measure again with hetero-glm5 bench machine\."):
        Profile.load(file)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "[" * 100_000])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "text").write_text(text)
    for name in ("text", "nowhere"):
        with pytest.raises(UserError, match=f"{name} is no machine profile"):
            Profile.load(tmp_path / name)
