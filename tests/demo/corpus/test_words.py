from __future__ import annotations

import pytest

from hetero_glm5.demo.corpus.words import CITIES, HELD_OUT_OF, NAMES, Draw, held_out, listed, unfolded


@pytest.mark.parametrize("method", ["name", "city", "invented"])
def test_words_of_the_two_splits_never_meet(method):
    train, held = ({getattr(draw, method)() for _ in range(5000)} for draw in (Draw("train", 1), Draw("held-out", 1)))
    assert len(train) > 2000 and len(held) > 500
    assert not train & held


def test_long_numbers_never_meet():
    train, held = ({draw.number(4) for _ in range(3000)} for draw in (Draw("train", 1), Draw("held-out", 1)))
    assert not train & held and min(train | held) >= 1000 and max(train | held) <= 9999


def test_about_one_key_in_eight_is_held_out():
    share = sum(held_out(f"key {i}") for i in range(20_000)) / 20_000
    assert share == pytest.approx(1 / HELD_OUT_OF, rel=0.1)


def test_both_splits_have_names_and_cities_and_the_best_known_are_trained():
    for table in (NAMES, CITIES):
        assert 2 < sum(map(held_out, table)) < len(table) // 3
    assert not any(map(held_out, ("Paris", "Tokyo", "Berlin", "London")))
    assert held_out("27 45"), "what the README asks first is no sum that was trained"


def test_the_same_key_draws_the_same():
    draws = [[draw.integer(0, 10**9) for _ in range(5)] for draw in (Draw("train", "a", 1), Draw("train", "a", 1))]
    assert draws[0] == draws[1]
    assert draws[0] != [Draw("train", "a", 2).integer(0, 10**9) for _ in range(5)]


def test_listed():
    assert [listed(list("abc"[:n])) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_unfolded_joins_indented_lines():
    assert unfolded("\na b\n  c\n\nd\n") == "a b c\n\nd"
