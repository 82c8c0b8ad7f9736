from __future__ import annotations

import re

import pytest

from hetero_glm5.demo.corpus.words import CITIES, HELD_OUT_OF, NAMES, Draw, held_out, listed, unfolded

MAKERS = {
    "name": Draw.name, "city": Draw.city, "invented": Draw.invented,
    "similar": lambda draw: draw.similar("Zarndol"), "label": lambda draw: draw.label("get_weather"),
}  # fmt: skip


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_words_of_the_two_splits_never_meet(make):
    train, held = ({make(draw) for _ in range(5000)} for draw in (Draw("train", 1), Draw("held-out", 1)))
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


def test_labels_are_identifiers_of_every_style():
    draw = Draw("train", "labels")
    labels = [draw.label("get_weather") for _ in range(2000)]
    assert all(re.fullmatch(r"[A-Za-z]\w*", label) for label in labels) and len(set(labels)) > 1500
    for style in (r"[a-z]+", r"[a-z]+_[a-z_]+", r"[a-z]+[A-Z][A-Za-z]+", r"[A-Z_]+", r"\w+_\d+", r"\w+_weather\w*"):
        assert sum(bool(re.fullmatch(style, label)) for label in labels) > 20, style


def test_listed():
    assert [listed(list("abc"[:n])) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_unfolded_joins_indented_lines():
    assert unfolded("\na b\n  c\n\nd\n") == "a b c\n\nd"
