"""Trace files: what is written is read, and nothing else is."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hetero_glm5.core import UserError
from hetero_glm5.placement.trace import Trace


def trace(experts: int = 32) -> Trace:
    """Two requests of 3 and 2 tokens, prefilled together; the first then decodes one."""
    rng = np.random.default_rng(0)
    return Trace(
        ids=np.stack([rng.permuted(np.arange(experts))[:4] for _ in range(18)]).reshape(6, 3, 4),
        step=np.array([0, 0, 0, 0, 0, 1]),
        request=np.array([0, 0, 0, 1, 1, 0]),
        position=np.array([0, 1, 2, 0, 1, 3]),
        decode=np.array([False] * 5 + [True]),
        layers=np.array([2, 3, 5]),
        kinds=np.array(["sums", "tools"]),
        experts=experts,
    )


@pytest.mark.parametrize(("experts", "dtype"), [(32, np.uint8), (256, np.uint8), (300, np.uint16)])
def test_round_trip(tmp_path, experts, dtype):
    written = trace(experts)
    written.save(tmp_path / "a.trace")
    read = Trace.load(tmp_path / "a.trace")
    assert read.ids.dtype == dtype and len(read) == 6 and read.experts == experts
    for field in dataclasses.fields(Trace):
        assert np.array_equal(getattr(read, field.name), getattr(written, field.name)), field.name


@pytest.mark.parametrize(
    "damage",
    [
        {"ids": np.full((6, 3, 4), 32)},
        {"ids": np.zeros((5, 3, 4))},
        {"request": np.array([0, 0, 0, 1, 2, 0])},
        {"layers": np.array([2, 3])},
        {"kinds": np.array(["sums"])},
        {"step": np.array([1, 0, 0, 0, 0, 0])},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, damage):
    dataclasses.replace(trace(), **damage).save(tmp_path / "a.trace")
    with pytest.raises(UserError, match="is damaged: its arrays do not fit together"):
        Trace.load(tmp_path / "a.trace")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("no trace")
    save_file({"ids": np.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("text", "nowhere", "other.safetensors"):
        with pytest.raises(UserError, match=f"{name} is no routing trace.*trace record"):
            Trace.load(tmp_path / name)


@pytest.mark.parametrize(
    ("header", "arrays", "words"),
    [
        ("{", {}, "is no routing trace: "),
        ("[2]", {}, "is no routing trace of version 2"),
        ({"version": 1}, {}, "is no routing trace of version 2"),
        ({"experts": 32.0}, {}, "other arrays"),
        ({"experts": 257}, {}, "other arrays"),
        ({"kinds": None}, {}, "other arrays"),
        ({"kinds": []}, {}, "do not fit together"),
        ({"kinds": [["sums"], ["tools", "code"]]}, {}, "other arrays"),
        ({}, {"more": np.zeros(1)}, "other arrays"),
        ({}, {"step": np.zeros(6)}, "other arrays"),
        ({}, {"step": np.zeros((6, 1), np.int32)}, "do not fit together"),
        ({}, {"request": np.full(6, -1, np.int32)}, "do not fit together"),
    ],
)
def test_reading_is_strict(tmp_path, header, arrays, words):
    path = tmp_path / "a.trace"
    trace().save(path)
    with safe_open(path, framework="numpy") as file:
        (key, written), *_ = file.metadata().items()
    if isinstance(header, dict):
        header = json.dumps(json.loads(written) | header)
    save_file(load_file(path) | arrays, path, {key: header})
    with pytest.raises(UserError, match=f"a.trace .*{words}.*trace record"):
        Trace.load(path)


def test_a_trace_without_tokens(tmp_path):
    whole = trace()
    rows = {name: getattr(whole, name)[:0] for name in ("ids", "step", "request", "position", "decode")}
    dataclasses.replace(whole, **rows).save(tmp_path / "empty")
    assert len(Trace.load(tmp_path / "empty")) == 0
