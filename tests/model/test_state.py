"""The cache's pages, and how a step's sequences are put together."""

import itertools

import pytest
import shapes
import torch
from oracle import random_ids
from tiny import tiny_checkpoint
from tiny_model import load_model, rows_of

from hetero_glm5.model.key_store import row_bytes
from hetero_glm5.model.state import Cache, Group, Segment, Step, cache_bytes_per_token
from hetero_glm5.model_config import ModelConfig

DTYPES = ("bfloat16", "float32", "fp8_e4m3")
INDEX_SHARE = {"num_hidden_layers": 78, "index_topk_freq": 4, "index_skip_topk_offset": 3}
IDS = torch.tensor(random_ids(64))


@pytest.mark.parametrize(
    ("share", "dtype", "sizes"),
    [
        ({}, "bfloat16", (109_824, 111_232)),
        ({}, "float32", (219_648, 222_464)),
        ({}, "fp8_e4m3", (61_464, 62_252)),
        (INDEX_SHARE, "bfloat16", (95_232, 96_640)),
    ],
)
def test_bytes_of_a_cached_token_are_glm5s(share, dtype, sizes):
    config = ModelConfig.parse(shapes.GLM5 | share)
    assert tuple(cache_bytes_per_token(config, dtype, mtp) for mtp in (False, True)) == sizes


def random_cache(dtype: str, slots: int, seed: int, **config) -> Cache:
    cache = Cache.allocate(ModelConfig.parse(shapes.GLM5 | config), slots, dtype=dtype, device="cpu", mtp=True)
    generator = torch.Generator().manual_seed(seed)
    for store in cache.stores:
        store.rows.view(torch.uint8).random_(0, 256, generator=generator)  # NaNs too: bytes are what is moved
    return cache


def raw(cache: Cache) -> list[torch.Tensor]:
    return [store.rows.view(torch.uint8).clone() for store in cache.stores]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [{"num_hidden_layers": 4}, INDEX_SHARE | {"num_hidden_layers": 6}])
@pytest.mark.parametrize("page", [3, 8])
def test_pages_come_back_bit_for_bit(dtype, config, page):
    slots = 7 * page + 2  # the last two slots are in no page
    source, target = (random_cache(dtype, slots, seed, **config) for seed in (0, 1))
    data = source.read_pages([5, 0, 2], page)
    assert data.dtype == torch.uint8 and data.is_contiguous()
    assert data.shape == (3, source.page_bytes(page)) and source.page_bytes(page) == page * sum(
        row_bytes(store.format) for store in source.stores
    )
    before, want = raw(target), raw(source)
    target.write_pages([1, 6, 2], data)
    for got, old, new in zip(raw(target), before, want, strict=True):
        for to, origin in ((1, 5), (6, 0), (2, 2)):
            old[to * page : (to + 1) * page] = new[origin * page : (origin + 1) * page]
        assert torch.equal(got, old)
    assert torch.equal(target.read_pages([1, 6, 2], page), data)
    assert source.read_pages([], page).shape == (0, source.page_bytes(page))


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_of_slots(dtype):
    cache = random_cache(dtype, 40, 0, num_hidden_layers=4)
    want = raw(cache)
    for rows in want:
        rows[8:11], rows[32:34] = rows[0:3].clone(), rows[9:11].clone()  # the second copy reads what was there before
    cache.copy_slots([(0, 8, 3), (9, 32, 2), (5, 20, 0)])
    assert all(map(torch.equal, raw(cache), want))
    cache.copy_slots([])
    assert all(map(torch.equal, raw(cache), want))


def test_neighbours_of_a_kind_are_taken_together():
    config = ModelConfig.parse(shapes.GLM5 | {"index_topk": 32})
    spans = [(19, 20, 0), (30, 31, 64), (9, 10, 128), (3, 10, 192), (3, 10, 256), (33, 34, 320), (49, 50, 384)]
    groups = Step.of(rows_of(IDS, *spans), config).groups
    assert [group.shape for group in groups] == [(2, 1), (1, 1), (2, 7), (2, 1)]
    assert [group.long for group in groups] == [False, False, False, True]
    assert [(group.rows.start, group.rows.stop) for group in groups] == [(0, 2), (2, 3), (3, 17), (17, 19)]
    first, alone, *_ = groups
    assert first.seen.context.shape == (2, 31) and first.seen.last.tolist() == [[19], [30]]
    assert alone.seen.context.tolist() == [[*range(128, 138)]] and alone.seen.last is None
    assert groups[2](torch.arange(19)).tolist() == [[*range(3, 10)], [*range(10, 17)]]


def test_a_short_context_is_filled_with_its_own_slots():
    """What lies in other slots may be anything, and 0 · NaN is NaN."""
    segments = [Segment(0, 1, torch.tensor([7])), Segment(1, 2, torch.tensor([4, 5, 6]))]
    group = Group.of(segments, torch.tensor([0, 2]), long=False)
    assert group.seen.context.tolist() == [[7, 7, 7], [4, 5, 6]]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float32", "fp8_e4m3"])
def test_decoded_rows_equal_prefilled_ones_beside_any_neighbours(checkpoints, dtype):
    """One row alone, and beside others that attend to all (index_topk is 16), are chosen for or are prefilled."""
    model, _, experts = load_model(tiny_checkpoint(checkpoints))

    def fresh() -> Cache:
        cache = Cache.allocate(model.config, 256, dtype=dtype, device="cpu")
        for store in cache.stores:
            store.rows.view(torch.uint8).fill_(255)  # NaN in every format
        return cache

    cache = fresh()
    want = model.forward(rows_of(IDS, (0, 45, 10)), cache, experts)
    assert want.isfinite().all()
    for last in (9, 45):
        tolerance = 1e-5 if dtype == "float32" else 1e-4  # a value that is rounded the other way shows
        alone = model.forward(rows_of(IDS, (last - 1, last, 10)), cache, experts)
        assert (alone - want[last - 1]).abs().max() <= tolerance
        spans = [(last - 1, last, 10), (39, 40, 10), (0, 12, 80), (0, 5, 100), (0, 1, 120), (0, 20, 140)]
        for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
            got = model.forward(rows_of(IDS, *(spans[i] for i in order)), cache, experts)
            starts = itertools.accumulate((spans[i][1] - spans[i][0] for i in order), initial=0)
            at = dict(zip(order, starts, strict=False))
            assert (got[at[0]] - want[last - 1]).abs().max() <= tolerance
            assert (got[at[1]] - want[39]).abs().max() <= tolerance
            assert got.isfinite().all()
    exact = Cache.allocate(model.config, 64, dtype="float32", device="cpu")
    difference = (model.forward(rows_of(IDS, (0, 45, 10)), exact, experts) - want).abs().max()
    assert (difference > 1e-3) == (dtype == "fp8_e4m3")
