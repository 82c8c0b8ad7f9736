"""Trace files: what is written is read, and nothing else is."""

import dataclasses

import numpy as np
import pytest

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
        {"layers": np.array([2, 3])},
        {"kinds": np.array(["sums"])},
        {"step": np.array([1, 0, 0, 0, 0, 0])},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, damage):
    dataclasses.replace(trace(), **damage).save(tmp_path / "a.npz")
    with pytest.raises(UserError, match="is damaged: its arrays do not fit together"):
        Trace.load(tmp_path / "a.npz")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("no trace")
    np.savez(tmp_path / "other.npz", ids=np.zeros(3))
    for name in ("text", "nowhere", "other.npz"):
        with pytest.raises(UserError, match=f"{name} is no routing trace.*trace record"):
            Trace.load(tmp_path / name)
