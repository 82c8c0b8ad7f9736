from __future__ import annotations

import torch
from moe_case import DISTINCT, OUTLIER_FACTOR, REFERENCE_ROWS, MoeCase

CASE = MoeCase(hidden=128, intermediate=64, experts=12, topk=3, seed=5)


def test_the_same_seed_gives_the_same_numbers():
    for a, b in zip(CASE.tokens(9, 2), MoeCase(128, 64, 12, 3, seed=5).tokens(9, 2), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(CASE.weights(1)[0], MoeCase(128, 64, 12, 3, seed=5).weights(1 + DISTINCT)[0])


def test_first_rows_do_not_depend_on_the_number_of_rows():
    many = CASE.tokens(40, 0)
    for rows in (1, REFERENCE_ROWS, 17):
        for few, all_of_them in zip(CASE.tokens(rows, 0), many, strict=True):
            assert len(few) == rows and few.is_contiguous()
            shared = min(rows, REFERENCE_ROWS)
            assert torch.equal(few[:shared], all_of_them[:shared])


def test_routing_is_without_repetition_and_differs_by_draw():
    ids = CASE.tokens(50, 1)[1]
    assert all(len(set(row)) == 3 for row in ids.tolist()) and 0 <= int(ids.min()) <= int(ids.max()) < 12
    assert not torch.equal(ids, CASE.tokens(50, 2)[1])
    assert torch.allclose(CASE.tokens(50, 1)[2].sum(1), torch.ones(50))


def test_error_is_relative():
    assert CASE.error(CASE.reference) == 0
    assert abs(CASE.error(1.5 * CASE.reference) - 0.5) < 1e-5
    assert abs(CASE.error(torch.zeros(1, 128)) - 1) < 1e-6


def test_outlier_columns_are_each_matrixs_own():
    outliers = MoeCase(512, 400, 2, 1, seed=5, outliers=True)
    plain = MoeCase(512, 400, 2, 1, seed=5)
    columns = []
    for large, weight in zip(outliers.distinct[0], plain.distinct[0], strict=True):
        factor = (large / weight).round().unique(dim=0)
        assert factor.shape == (1, weight.shape[1]) and factor.unique().tolist() == [1, OUTLIER_FACTOR]
        columns.append(factor[0].argsort(descending=True)[: int((factor == OUTLIER_FACTOR).sum())].tolist())
    assert list(map(len, columns)) == [3, 3, 2] and columns[0] != columns[1]
