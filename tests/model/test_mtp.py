"""Rows that draft nothing leave the cache as rows that do."""

from dataclasses import replace

import pytest
import torch
from oracle import random_ids
from tiny import tiny_checkpoint
from tiny_model import load_model, rows_of

from hetero_glm5.experts.cpu_tier import HostPool
from hetero_glm5.model import host_step
from hetero_glm5.model.state import Cache

T = 40  # longer than index_topk 16: the layer's own indexer chooses
IDS = torch.tensor(random_ids(T))
ULP = {"float32": 1e-6, "bfloat16": 2**-7, "fp8_e4m3": 2**-3}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("split", [1, 10, T - 2])
@pytest.mark.parametrize("path", ["torch", "few rows", "many rows"])
def test_remembered_rows_serve_like_computed_ones(checkpoints, monkeypatch, dtype, split, path):
    if path == "many rows":
        monkeypatch.setattr(host_step, "FEW_ELEMENTS", 0)
    model, mtp, experts = load_model(tiny_checkpoint(checkpoints), None if path == "torch" else HostPool(2))
    hidden = torch.randn(T, model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def fresh() -> Cache:
        cache = Cache.allocate(model.config, T, dtype=dtype, device="cpu", mtp=True)
        for store in cache.stores:
            store.rows.view(torch.uint8).fill_(255)  # NaN in every format
        return cache

    computed, remembered = fresh(), fresh()
    want = mtp.forward(hidden, rows_of(IDS, (0, T, 0)), computed, experts)
    first, second = (replace(rows_of(IDS, (a, b, 0)), segments=[]) for a, b in ((0, split), (split, T - 1)))
    mtp.remember(hidden[:split], first, remembered)
    before = hidden[split : T - 1], second
    got = mtp.forward(hidden[T - 1 :], rows_of(IDS, (T - 1, T, 0)), remembered, experts, before)
    assert want.isfinite().all()
    for a, b in zip(computed.stores, remembered.stores, strict=True):
        have, keys = a.read(torch.arange(T)), b.read(torch.arange(T))
        torch.testing.assert_close(keys, have, rtol=ULP[dtype], atol=2e-6, equal_nan=True)
        assert have.isfinite().all() == (a in (computed.latent[-1], computed.index[-1]))
    tolerance = 3e-6 if dtype == "float32" else 1e-2  # a key that is rounded the other way shows
    assert (got - want[-1]).abs().max() <= tolerance
