from __future__ import annotations

import json

from hetero_glm5.demo.corpus.tool_values import TEXTS, schema, sentence, value, varied
from hetero_glm5.demo.corpus.words import Draw, held_out


def test_texts_are_drawn_whole():
    draw = Draw("train", "texts")
    for kind in TEXTS:
        for _ in range(30):
            drawn, said = value(draw, kind)
            assert drawn == said and said.strip() == said and said and not set('{}"\n') & set(said)
            assert schema(kind) == {"type": "string"}


def test_sentences_are_filled():
    draw = Draw("train", "sentences")
    assert all("{" not in sentence(draw) for _ in range(300))


def test_numbers_keep_their_type_through_json():
    draw = Draw("train", "numbers")
    for kind, types in (("int:1:60", {int}), ("num:1:3", {int, float})):
        seen = {type(json.loads(json.dumps(value(draw, kind)[0]))) for _ in range(200)}
        assert seen == types
        assert all(str(drawn) == said for drawn, said in (value(draw, kind) for _ in range(100)))


def test_what_is_held_out():
    draw = Draw("held-out", "values")
    assert all(held_out(value(draw, kind)[0]) for kind in ("city", "person") for _ in range(50))


def test_enums_and_truth():
    draw = Draw("train", "enums")
    assert schema("on/off") == {"type": "string", "enum": ["on", "off"]}
    assert {value(draw, "on/off")[0] for _ in range(50)} == {"on", "off"}
    assert {value(draw, "bool:Lock:Unlock") for _ in range(50)} == {(True, "Lock"), (False, "Unlock")}
    shown = [varied(draw, "on/off") for _ in range(100)]
    assert {"on/off", "off/on"} < set(shown) and len(set(shown)) > 20
    assert varied(draw, "city") == "city"
    assert value(draw, "true") == (True, "")
