"""Few rows over _C beside the same model in torch."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import random_ids
from tiny import tiny_checkpoint
from tiny_model import load_model, rows_of

from hetero_glm5 import _C
from hetero_glm5.experts.cpu_tier import HostPool
from hetero_glm5.model import host_step
from hetero_glm5.model.few_rows import FewRows
from hetero_glm5.model.host_step import most_few_rows, stored
from hetero_glm5.model.key_store import KeyStore, key_format
from hetero_glm5.model.state import Cache
from hetero_glm5.model_config import ModelConfig

T = 61  # longer than index_topk 16
IDS = torch.tensor(random_ids(T))
CUTS = (0, 5, 6, 30, 59, 60, T)  # a prompt in parts, then decoded tokens
VARIANTS = {
    "plain": {},
    "shared selection": {"num_hidden_layers": 9, "index_topk_freq": 4, "index_skip_topk_offset": 3},
    "groups": {"n_group": 4, "topk_group": 2},
    "weights as they are": {"norm_topk_prob": False},
    "nothing a multiple of 16": {"q_lora_rank": 100, "kv_lora_rank": 90, "qk_nope_head_dim": 37, "v_head_dim": 51}
    | {"index_head_dim": 45, "qk_rope_head_dim": 22, "qk_head_dim": 59, "moe_intermediate_size": 40},
}


def poisoned(config, slots: int = T, dtype: str = "float32") -> Cache:
    cache = Cache.allocate(config, slots, dtype=dtype, device="cpu", mtp=True)
    for store in cache.stores:
        store.rows.view(torch.uint8).fill_(255)  # NaN in every format
    return cache


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_hidden_states_and_keys_are_torchs(checkpoints, variant, isa):
    folder = tiny_checkpoint(checkpoints, **VARIANTS[variant])
    model, mtp, experts = load_model(folder)
    few, few_mtp, _ = load_model(folder, HostPool(2, isa))
    cache, few_cache = poisoned(model.config), poisoned(model.config)
    steps = [rows_of(IDS, (a, b, 0)) for a, b in itertools.pairwise(CUTS)]
    whole = rows_of(IDS, (0, T, 0))
    assert few.few.step(steps[0], few_cache)
    want = model.forward(whole, cache, experts)
    got = torch.cat([few.forward(rows, few_cache, experts) for rows in steps])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(few.logits(got), model.logits(want), rtol=1e-4, atol=2e-4)

    want = mtp.forward(want, whole, cache, experts)
    few_mtp.remember(got[: CUTS[2]], replace(rows_of(IDS, (0, CUTS[2], 0)), segments=[]), few_cache)
    got = torch.cat(
        [
            few_mtp.forward(got[a:b], rows_of(IDS, (a, b, 0)), few_cache, experts)
            for a, b in itertools.pairwise(CUTS[2:])
        ]
    )
    torch.testing.assert_close(got, want[CUTS[2] :], rtol=1e-4, atol=1e-4)
    for a, b in zip(cache.stores, few_cache.stores, strict=True):
        torch.testing.assert_close(b.rows, a.rows, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_thousands_of_positions(checkpoints):
    folder, length = tiny_checkpoint(checkpoints), 1300
    ids = torch.tensor(random_ids(length))
    model, _, experts = load_model(folder)
    few, _, _ = load_model(folder, HostPool(2))
    cache = poisoned(model.config, length)
    model.forward(rows_of(ids, (0, length - 3, 0)), cache, experts)
    last = rows_of(ids, (length - 3, length, 0))
    got = few.forward(last, cache, experts)
    torch.testing.assert_close(got, model.forward(last, cache, experts), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_neither_neighbours_nor_threads_nor_the_isa_change_a_bit(checkpoints):
    folder, spans = tiny_checkpoint(checkpoints), [(40, 41, 0), (7, 8, T), (20, 29, 2 * T), (0, 3, 3 * T)]
    results = []
    for threads, isa in [(1, _C.isas()[0]), (3, _C.isas()[0]), *((2, isa) for isa in _C.isas())]:
        few, _, experts = load_model(folder, HostPool(threads, isa))

        def filled(few=few, experts=experts) -> Cache:
            cache = poisoned(few.config, 4 * T)
            for first, _, slot in spans:
                for a in range(0, first, 10):
                    few.forward(rows_of(IDS, (a, min(a + 10, first), slot)), cache, experts)
            return cache

        def alone(layer, x, ids, weights, clock, experts=experts):  # torch's own products depend on the batch
            rows = zip(x.split(1), ids.split(1), weights.split(1), strict=True)
            y = torch.cat([experts(layer, *row, clock)() for row in rows])
            return lambda: y

        together = few.forward(rows_of(IDS, *spans), filled(), alone)
        single = torch.cat([few.forward(rows_of(IDS, span), filled(), alone) for span in spans])
        assert together.isfinite().all() and torch.equal(together, single)
        results.append(together)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("cache_type", ["float32", "bfloat16"])
@torch.inference_mode()
def test_bf16_weights_and_keys(checkpoints, cache_type, isa):
    folder = tiny_checkpoint(checkpoints)
    wide, _, wide_experts = load_model(folder)
    few, _, experts = load_model(folder, HostPool(2, isa), torch.bfloat16)
    model, _, _ = load_model(folder, dtype=torch.bfloat16)
    steps = [rows_of(IDS, (a, b, 0)) for a, b in itertools.pairwise(CUTS)]
    few_cache = poisoned(few.config, dtype=cache_type)
    got = torch.cat([few.forward(rows, few_cache, experts) for rows in steps])
    whole = rows_of(IDS, (0, T, 0))
    want = wide.forward(whole, poisoned(wide.config), wide_experts)
    torchs = model.forward(whole, poisoned(few.config, dtype=cache_type), experts)
    assert got.dtype == torch.bfloat16
    error, torchs_error = ((part.float() - want).norm(dim=-1).median() for part in (got, torchs))
    assert error < torchs_error


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_any_size(checkpoints, isa, dtype):
    generator = torch.Generator().manual_seed(3)
    pool = HostPool(2, isa)
    few = FewRows(ModelConfig.load(tiny_checkpoint(checkpoints)), pool.handle)
    for rows, cols, tokens in itertools.product((1, 9, 100), (1, 15, 16, 33, 200), (1, 2, 3, 5, 8)):
        matrix = torch.randn(rows, cols, generator=generator).to(dtype)
        x = torch.randn(tokens, cols, generator=generator)
        want = x.to(dtype).double() @ matrix.double().T
        torch.testing.assert_close(few.product(matrix)(x).double(), want, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_what_is_not_finite_stays_with_its_sequence(checkpoints):
    folder, spans = tiny_checkpoint(checkpoints), [(30, 31, 0), (30, 31, T)]
    few, _, experts = load_model(folder, HostPool(2))
    cache = poisoned(few.config, 2 * T)
    few.forward(rows_of(IDS, (0, 30, T)), cache, experts)  # the first sequence's keys are NaN
    got = few.forward(rows_of(IDS, *spans), cache, experts)
    assert got[0].isnan().any() and got[1].isfinite().all()


def test_what_it_takes(checkpoints):
    few, _, _ = load_model(tiny_checkpoint(checkpoints), HostPool(1))
    most = most_few_rows(few.config)
    ids = torch.zeros(most + 1, dtype=torch.int64)
    steps = [few.few.step(rows_of(ids, (0, count, 0)), poisoned(few.config)) for count in (most, most + 1)]
    assert [step.few for step in steps] == [True, False]


@pytest.mark.parametrize("kind", ["few values", "any values", "not finite", "one value", "zeros of both signs"])
def test_the_highest_scores_are_chosen_and_of_equal_ones_the_first(kind):
    """Scores of one head whose query is a row of ones are sums over the key, times the head's weight."""
    generator, length, topk = np.random.default_rng(4), 700, 256
    values = {
        "few values": generator.integers(0, 5, length).astype(np.float32),
        "any values": generator.lognormal(sigma=20, size=length).astype(np.float32),
        "not finite": generator.choice(np.array([np.nan, np.inf, 1, 2], np.float32), length),
        "one value": np.full(length, 3.0, np.float32),
        "zeros of both signs": generator.choice(np.array([0.0, -0.0, -1.0, 1e-40], np.float32), length),
    }[kind]
    keys, space = np.zeros((length, 4), np.float32), _C.DenseWorkspace(HostPool(2).handle)
    keys[:, 1] = values
    identity, positions = np.eye(length, dtype=np.float32), np.array([topk + 3, length - 1])
    for weight in (1.5, -1.5):
        step = _C.DenseStep(positions, positions, [(2, np.arange(length))], 2, 1e4, topk)
        step.select(space, np.ones((2, 1, 4), np.float32), np.full((2, 1), weight, np.float32), keys)
        mixed = np.zeros((2, 1, length), np.float32)
        step.attend(space, np.zeros((2, 1, length), np.float32), identity, 1.0, mixed)
        scores = weight * np.where(values > 0, values, 0)
        for row, position in enumerate(positions):
            best = np.argsort(-scores[: position + 1], kind="stable")[:topk]
            assert np.flatnonzero(mixed[row, 0]).tolist() == sorted(best)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_fp8_keys_are_those_of_the_key_store(checkpoints, variant, isa):
    """The first layer's are made of the same values whatever the cache's type."""
    few, _, experts = load_model(tiny_checkpoint(checkpoints, **VARIANTS[variant]), HostPool(2, isa))
    caches = [poisoned(few.config, dtype=dtype) for dtype in ("float32", "fp8_e4m3")]
    for cache, (a, b) in itertools.product(caches, itertools.pairwise(CUTS)):
        few.forward(rows_of(IDS, (a, b, 0)), cache, experts)
    plain, fp8 = ([cache.latent[0], cache.index[0]] for cache in caches)
    for have, like in zip(fp8, plain, strict=True):
        assert torch.equal(have.rows, have.format.encode(like.rows))


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize(("coded", "kept"), [(512, 64), (90, 22), (140, 3)])
def test_what_is_seen_of_fp8_keys_is_what_they_decode_to(coded, kept, isa):
    """Long and short contexts, neighbours in one and alone, more keys than are decoded at once; slots beside those that
    are read are NaN."""
    generator, heads, topk, pool = torch.Generator().manual_seed(1), 3, 300, HostPool(3, isa)
    format = key_format("fp8_e4m3", coded, kept)
    values = torch.randn(900, coded + kept, generator=generator) * torch.rand(900, 1, generator=generator)
    values[5] = 0.0
    stores = [KeyStore(format, 900, "cpu"), KeyStore(key_format("float32", coded, kept), 900, "cpu")]
    for store in stores:
        store.rows.view(torch.uint8).fill_(255)
    places = torch.randperm(900, generator=generator)
    stores[0].write(places[:700], values[:700])
    stores[1].write(places[:700], stores[0].read(places[:700]))
    spans = [(0, 9, 0, 30), (9, 10, 30, 20), (10, 50, 50, 600), (50, 51, 650, 41), (51, 52, 60, 590)]
    runs = [(b - a, places[first : first + length].numpy()) for a, b, first, length in spans]  # a:b are the rows
    positions = np.concatenate([np.arange(length - (b - a), length) for a, b, _, length in spans])
    slots, rows = places[: len(positions)].numpy(), len(positions)
    space = _C.DenseWorkspace(pool.handle)
    q = torch.randn(rows, heads, coded + kept, generator=generator).numpy()
    of_index, weights = q[..., :coded].copy(), np.random.default_rng(1).normal(size=(rows, heads)).astype(np.float32)
    index = [KeyStore(key_format(dtype, coded, 0), 900, "cpu") for dtype in ("fp8_e4m3", "float32")]
    index[0].write(places[:700], values[:700, :coded])
    index[1].write(places[:700], index[0].read(places[:700]))
    results = []
    for keys, index_keys in zip(stores, index, strict=True):
        step = _C.DenseStep(positions, slots, runs, 2, 1e4, topk)
        step.select(space, of_index, weights, stored(index_keys))
        out = np.full((rows, heads, coded), np.nan, np.float32)
        step.attend(space, q, stored(keys), 0.1, out)
        results.append(out)
    assert np.isfinite(results[0]).all() and np.array_equal(*results)


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache_type", ["float32", "bfloat16"])
@torch.inference_mode()
def test_what_many_rows_see(checkpoints, monkeypatch, variant, cache_type, isa):
    """Two prompts, one of them continued, beside a decoded row."""
    monkeypatch.setattr(host_step, "FEW_ELEMENTS", 0)
    folder, length = tiny_checkpoint(checkpoints, **VARIANTS[variant]), 230
    ids = torch.tensor(random_ids(length))
    model, mtp, experts = load_model(folder)
    host, host_mtp, _ = load_model(folder, HostPool(2, isa))
    cache, host_cache = (poisoned(model.config, 3 * length, cache_type) for _ in range(2))
    for spans in [(0, 90, 0), (0, 12, length)], [(90, length, 0), (12, 13, length), (0, 80, 2 * length)]:
        rows = rows_of(ids, *spans)
        want, got = model.forward(rows, cache, experts), host.forward(rows, host_cache, experts)
        assert_rows_close(got, want, cache_type)
        want, got = mtp.forward(want, rows, cache, experts), host_mtp.forward(got, rows, host_cache, experts)
        assert_rows_close(got, want, cache_type)


def assert_rows_close(got: torch.Tensor, want: torch.Tensor, cache_type: str) -> None:
    """A bf16 key that is rounded the other way may change what an indexer chooses; most rows are spared."""
    error = (got - want).abs().amax(-1)
    assert error.max() < 1e-4 if cache_type == "float32" else error.quantile(0.8) < 0.01


def test_refusals(checkpoints):
    pool = HostPool(1)
    few, _, experts = load_model(tiny_checkpoint(checkpoints), pool)
    rows = rows_of(IDS, (0, 3, 0))
    with pytest.raises(ValueError, match=r"latents has shape \[2, 128\], must be \[more than 2, 128\]"):
        few.forward(rows, poisoned(few.config, 2), experts)
    with pytest.raises(ValueError, match=r"position 5 is not among the 3 of its context"):
        _C.DenseStep(np.array([5]), np.array([5]), [(1, np.arange(3))], 32, 1e4, 16)
    with pytest.raises(ValueError, match="the runs have 2 rows, more than the step's 1"):
        _C.DenseStep(np.array([5]), np.array([5]), [(2, np.arange(9))], 32, 1e4, 16)
    space = _C.DenseWorkspace(pool.handle)
    mlp = _C.DenseFeedForward(space, np.zeros(8, np.float32), 1e-5, *_mlp(8, 4))
    with pytest.raises(ValueError, match=r"end\(\) of 2 rows, begin\(\) had 0"):
        mlp.end(np.zeros((2, 8), np.float32), None)
    with pytest.raises(ValueError, match=r"gate_up has shape \[8, 8\], must be \[10, 8\]"):
        _C.DenseFeedForward(space, np.zeros(8, np.float32), 1e-5, _mlp(8, 4)[0], _mlp(8, 5)[1])
    step = _C.DenseStep(np.arange(20), np.arange(20), [(20, np.arange(20))], 8, 1e4, 16)
    q, keys = np.zeros((20, 2, 12), np.float32), np.zeros((20, 12), np.float32)
    with pytest.raises(ValueError, match="a row sees more than 16 positions, and no indexer has chosen"):
        step.attend(space, q, keys, 1.0, np.zeros((20, 2, 8), np.float32))
    with pytest.raises(ValueError, match="out has 13 columns, more than the keys' 12"):
        step.attend(space, q, keys, 1.0, np.zeros((20, 2, 13), np.float32))
    with pytest.raises(ValueError, match=r"q has shape \[2, 20, 12\], must be \[20, \*, \*\]"):
        step.select(space, q.reshape(2, 20, 12), np.zeros((20, 2), np.float32), keys)
    with pytest.raises(ValueError, match=r"keys has shape \[19, 12\], must be \[more than 19, 12\]"):
        step.select(space, q, np.zeros((20, 2), np.float32), keys[1:])
    apart = _C.DenseStep(np.arange(20), np.arange(20), [], 8, 1e4, 16)
    with pytest.raises(ValueError, match="0 of 20 rows attend, all must"):
        apart.select(space, q, np.zeros((20, 2), np.float32), keys)
    pool.close()
    with pytest.raises(ValueError, match="this host pool is closed"):
        FewRows(few.config, pool.handle).product(torch.zeros(3, 4))(torch.zeros(1, 4))


def _mlp(hidden: int, intermediate: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((2 * intermediate, hidden), np.float32), np.zeros((hidden, intermediate), np.float32)
