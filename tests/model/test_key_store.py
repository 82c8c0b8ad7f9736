"""Each format against its arithmetic in float64, one value at a time."""

import math

import pytest
import torch

from hetero_glm5.model.key_store import KeyStore, key_format, row_bytes
from hetero_glm5.ops import reference as ops

SHAPES = [(512, 64), (128, 0), (96, 32), (200, 6), (7, 3)]  # GLM-5's rows, and ragged last groups


DTYPES = ("bfloat16", "float32", "fp8_e4m3")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def e4m3(value: float) -> float:
    """The nearest of the format's values, ties to even; |value| ≤ 448."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(value))), -6) - 3)
    return round(value / step) * step


@pytest.mark.parametrize(("coded", "kept"), SHAPES)
def test_fp8_rows_against_float64(coded, kept):
    x = normal(5, coded + kept) * torch.tensor([1e-3, 1.0, 40.0, 1e4, 1e30])[:, None]
    store = KeyStore(key_format("fp8_e4m3", coded, kept), 9, "cpu")
    slots = torch.tensor([8, 0, 3, 4, 1])
    store.write(slots, x)
    got = store.read(slots)
    assert got.dtype == torch.float32
    for row, have in zip(x.tolist(), got.double().tolist(), strict=True):
        for a in range(0, coded, 128):
            group = row[a : min(a + 128, coded)]
            scale = torch.tensor(max(map(abs, group)) / 448, dtype=torch.float64).float().item()
            for value, found in zip(group, have[a:], strict=False):
                assert abs(found - value) <= max(2**-4 * abs(value), 2**-10 * scale) * (1 + 1e-6)
                assert found == pytest.approx(e4m3(value / scale) * scale, rel=0.13)  # its neighbour at a tie
        assert max(map(abs, have[:coded])) == pytest.approx(max(map(abs, row[:coded])), rel=1e-6)
    assert torch.equal(got[:, coded:], x[:, coded:].bfloat16().float())
    assert (got[:, :coded] != x[:, :coded]).float().mean() > 0.5


def test_fp8_rounds_to_the_nearest():
    """With a scale of exactly one, all values can be told."""
    values = torch.cat((torch.tensor([448.0]), torch.linspace(-40, 40, 127)))
    format = key_format("fp8_e4m3", 128, 0)
    got = format.decode(format.encode(values[None]))[0]
    assert got.tolist() == [e4m3(v) for v in values.tolist()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plain_rows(dtype):
    x = normal(3, 40)
    store = KeyStore(key_format(dtype, 32, 8), 4, "cpu")
    store.write(torch.tensor([2, 0, 1]), x)
    got = store.read(torch.tensor([[1, 2], [0, 0]]))
    assert got.dtype == torch.float32
    assert torch.equal(got, x.to(getattr(torch, dtype)).float()[torch.tensor([[2, 0], [1, 1]])])


def test_bytes_of_a_row_are_glm5s():
    sizes = {dtype: (row_bytes(key_format(dtype, 512, 64)), row_bytes(key_format(dtype, 128, 0))) for dtype in DTYPES}
    assert sizes == {"bfloat16": (1152, 256), "float32": (2304, 512), "fp8_e4m3": (656, 132)}


def test_zeros_and_values_that_are_no_numbers():
    x = torch.zeros(4, 136)
    x[1, 5], x[2, 5], x[3] = float("nan"), float("inf"), 1e-42
    format = key_format("fp8_e4m3", 128, 8)
    got = format.decode(format.encode(x))
    assert torch.equal(got[0], x[0])
    assert got[1, :128].isnan().all() and not got[2, 5].isfinite()  # seen by whoever looks for NaN, never made a number
    assert got[3].isfinite().all() and got[3].abs().max() <= 2e-42


@pytest.mark.parametrize("name", ["dense", "selected"])
def test_attention_over_fp8_is_as_near_as_its_rounding(name):
    """Scores move by at most e = scale · Σ|q||δ|, weights by a factor of at most exp(2e), and the mixed values by δ."""
    T, S, H, latent, rope, scale = 3, 40, 4, 200, 16, 0.02
    rows, q = normal(S, latent + rope), normal(T, H, latent + rope, seed=1)
    store = KeyStore(key_format("fp8_e4m3", latent, rope), S + 8, "cpu")
    store.rows.fill_(255)  # every field is NaN where nothing was written
    slots = torch.randperm(S + 8, generator=torch.Generator().manual_seed(2))[:S]
    store.write(slots, rows)

    hidden = torch.arange(S) > torch.arange(S - T, S)[:, None]
    if name == "dense":
        got = ops.attend_dense(q[None], store.read, ops.Seen(slots[None], torch.arange(S - T, S)[None]), scale, latent)[
            0
        ]
    else:
        got = ops.attend_selected(q, store.read, torch.where(hidden, -1, slots), scale, latent)
    wide = rows.double()
    scores = (q.double() @ wide.T * scale).masked_fill(hidden[:, None], float("-inf"))
    weights = scores.softmax(-1)
    want = weights @ wide[:, :latent]

    largest = torch.stack([part.abs().amax(-1) for part in wide[:, :latent].split(128, -1)], -1)
    scales = (largest / 448).repeat_interleave(128, -1)[:, :latent]
    delta = torch.cat((torch.maximum(wide[:, :latent].abs() / 16, scales / 1024), wide[:, latent:].abs() / 256), -1)
    e = (q.double().abs() @ delta.T * scale).amax(-1, keepdim=True)
    bound = torch.expm1(2 * e) * (weights @ wide[:, :latent].abs()) + weights @ delta[:, :latent] * torch.exp(2 * e)
    assert ((got - want).abs() <= bound).all()
    assert bound.max() < 1.5 and 1e-3 < (got - want).abs().max() < 0.05
