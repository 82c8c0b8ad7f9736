"""The output parser against the shared vectors and its own rules, cut in every way."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_glm5.server.parsers import OutputParser, ParsedMessage

VECTORS = json.loads((Path(__file__).parent / "data" / "parser.json").read_text(encoding="utf-8"))


def schema_of(short: str) -> dict:
    if short.startswith("anyOf["):
        return {"anyOf": [{"type": kind} for kind in short[6:-1].split(",")]}
    if short.startswith("enum["):
        return {"enum": short[5:-1].split(",")}
    return {"type": short[1:-1].split(",") if short.startswith("[") else short}


def tool(name: str, properties: dict, **root) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties, **root}}}


TOOLS = [
    tool(name, {key: schema_of(short) for key, short in fields.items()})
    for name, fields in VECTORS["tool_schemas"].items()
]


def parse(pieces: list[str], thinking: bool, reasoning: bool = True, tools: list | None = TOOLS) -> ParsedMessage:
    parser = OutputParser(thinking=thinking, reasoning=reasoning, tools=tools)
    message = ParsedMessage()
    for piece in pieces:
        message.add(parser.feed(piece))
    message.add(parser.finish())
    return message


def cut(text: str, places) -> list[str]:
    ends = [0, *sorted(places), len(text)]
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def cuttings(text: str):
    """The text whole, one character at a time, cut in two at every place, and in many at random ones."""
    yield [text]
    yield list(text)
    for place in range(1, len(text)):
        yield cut(text, [place])
    draw = random.Random(text)
    for _ in range(50):
        yield cut(text, draw.sample(range(len(text)), draw.randrange(len(text))))


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["text"][:40])
def test_vectors_for_every_cutting(case):
    want = case["want"]
    for pieces in cuttings(case["text"]):
        got = parse(pieces, case["thinking"])
        assert (got.reasoning or None, got.content or None) == (want["reasoning"], want["content"]), pieces
        assert (got.calls or []) == want["calls"], pieces


# text, thinking -> reasoning, content, calls
CASES = [
    ("<think>r</think>a", True, "r", "a", []),
    ("</think>a", True, "", "a", []),
    ("r\n</think>ok", True, "r", "ok", []),
    ("r</thi", True, "r</thi", "", []),
    ("<thin", True, "<thin", "", []),
    ("r<tool_call>list_files</tool_call>", True, "r", "", [["list_files", "{}"]]),
    ("r<tool_call>list_files</tool_call></think>b", True, "r", "b", [["list_files", "{}"]]),
    ("a < b <<tool_call>list_files</tool_call>", False, "", "a < b <", [["list_files", "{}"]]),
    ("  \n", False, "", "  \n", []),
    ("x\n\n<tool_call>list_files</tool_call>\n", False, "", "x", [["list_files", "{}"]]),
    ("\n<tool_call>list_files</tool_call> b ", False, "", "b", [["list_files", "{}"]]),
    ("<tool_call>nope</tool_call>\nb ", False, "", "\nb ", []),
    ("<tool_call>list_files", False, "", "", []),
    ("<tool_call>list_files<tool_call>list_files</tool_call>", False, "", "", [["list_files", "{}"]]),
    ("<tool_call>get_weather<arg_key>city</arg_key><arg_value>Par", False, "", "", [["get_weather", '{"city": "Par']]),
    (
        "<tool_call>get_weather\n<arg_key> city </arg_key>\n<arg_value></arg_value>\n</tool_call>",
        False,
        "",
        "",
        [["get_weather", '{"city": ""}']],
    ),
    (
        '<tool_call>get_weather<arg_key>city</arg_key><arg_value>C:\\d\n"<b>"</tool_call></arg_valu</arg_value>'
        "<tool_call>list_files</tool_call>",
        False,
        "",
        "",
        [["get_weather", r'{"city": "C:\\d\n\"<b>\"</tool_call></arg_valu"}'], ["list_files", "{}"]],
    ),
    (
        "<tool_call>search<arg_key>limit</arg_key><arg_value>1</arg_value><arg_key>other</arg_key><arg_value>2"
        "</arg_value><arg_key>lost</arg_key></tool_call>",
        False,
        "",
        "",
        [["search", '{"limit": 1, "other": "2"}']],
    ),
]


@pytest.mark.parametrize("text, thinking, reasoning, content, calls", CASES, ids=range(len(CASES)))
def test_rules_for_every_cutting(text, thinking, reasoning, content, calls):
    for pieces in cuttings(text):
        got = parse(pieces, thinking)
        assert (got.reasoning, got.content, got.calls or []) == (reasoning, content, calls), pieces


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
WORDS = [
    "mix",
    "get_weather",
    "list_files",
    "nope",
    "s",
    "i",
    "o",
    "city",
    "7",
    '{"a": [1]}',
    "é",
    "\n",
    " ",
    "<",
    "</",
    '"',
]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(TAGS + WORDS), max_size=25), st.booleans(), st.data())
def test_any_text_says_the_same_however_it_is_cut(words, thinking, data):
    text = "".join(words)
    places = data.draw(st.sets(st.integers(0, len(text))))
    assert parse(cut(text, places), thinking) == parse([text], thinking)


@pytest.mark.parametrize(
    "key, value, want",
    [
        ("i", "7", 7),
        ("i", " 7\n", 7),
        ("i", "1_0", "1_0"),
        ("i", "9" * 5000, "9" * 5000),
        ("n", "3.0", 3),
        ("n", "0.25", 0.25),
        ("n", "12345678901234567890", 12345678901234567890),
        ("n", "1e400", "1e400"),
        ("n", "NaN", "NaN"),
        ("b", "True", True),
        ("b", "yes", "yes"),
        ("o", "{bad json}", "{bad json}"),
        ("o", '{"x": NaN}', '{"x": NaN}'),
        ("o", '{"a":  1.0}', {"a": 1.0}),
        ("o", "[" * 100_000, "[" * 100_000),
        ("a", "[1, 2]", [1, 2]),
        ("u", '{"k": 1}', {"k": 1}),
        ("u", "plain", "plain"),
        ("sn", "null", None),
        ("sn", "12", "12"),
        ("e", "x", "x"),
    ],
)
def test_argument_types(key, value, want):
    text = f"<tool_call>mix<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>"
    (call,) = parse([text], False).calls
    assert json.loads(call[1]) == {key: want}
    assert parse([text[: len(text) // 2], text[len(text) // 2 :]], False).calls == [call]


def test_local_references_and_nullable_are_followed():
    properties = {"p": {"$ref": "#/$defs/P"}, "q": {"type": "integer", "nullable": True}, "r": {"$ref": "#/$defs/R"}}
    loop = {"P": {"type": "object"}, "R": {"$ref": "#/$defs/R"}}
    tools = [tool("f", properties, **{"$defs": loop})]
    pair = "<arg_key>{}</arg_key><arg_value>{}</arg_value>".format
    text = "<tool_call>f" + pair("p", '{"a": 1}') + pair("q", "null") + pair("r", "5") + "</tool_call>"
    (call,) = parse([text], False, tools=tools).calls
    assert json.loads(call[1]) == {"p": {"a": 1}, "q": None, "r": "5"}


def test_malformed_and_self_referencing_schemas_say_nothing():
    many = {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}] * 20}
    properties = {
        "a": {"anyOf": 5, "oneOf": {"x": 1}, "allOf": "x"},
        "b": {"enum": 5},
        "c": {"type": [{}, 5, "integer"]},
        "d": {"type": {}},
        "e": {"$ref": "#/$defs/A"},
        "f": 5,
        "g": {"$ref": "#/"},
    }
    tools = [tool("f", properties, **{"$defs": {"A": many, "B": many}})]
    pairs = "".join(f"<arg_key>{key}</arg_key><arg_value>7</arg_value>" for key in properties)
    (call,) = parse([f"<tool_call>f{pairs}</tool_call>"], False, tools=tools).calls
    assert json.loads(call[1]) == {key: 7 if key == "c" else "7" for key in properties}


def test_what_refers_to_too_much_may_be_anything():
    chain = {f"x{i}": {"$ref": f"#/$defs/x{i + 1}"} for i in range(3000)} | {"x3000": {"type": "integer"}}
    properties = {f"p{i}": {"$ref": f"#/$defs/x{i}"} for i in range(3001)}
    pairs = "".join(f"<arg_key>{key}</arg_key><arg_value>7</arg_value>" for key in properties)
    pairs += "<arg_key>p0</arg_key><arg_value>some</arg_value>"
    (call,) = parse(
        [f"<tool_call>f{pairs}</tool_call>"], False, tools=[tool("f", properties, **{"$defs": chain})]
    ).calls
    assert json.loads(call[1]) == dict.fromkeys(properties, 7) | {"p0": "some"}


def test_long_texts_are_parsed_in_one_pass():
    """What costs more with each tag, or each digit, would take minutes here."""
    count, almost = 50_000, "1" * 300_000 + "x"
    pair = "<arg_key>limit</arg_key><arg_value>{}</arg_value>".format
    message = parse([f"a<tool_call>search{pair(5)}</tool_call>" * count, f"<tool_call>search{pair(almost)}"], False)
    assert message.content == "a" * count and message.calls[:-1] == [["search", '{"limit": 5}']] * count
    assert message.calls[-1][1] == f'{{"limit": "{almost}"'


def test_last_of_a_repeated_key_wins():
    pair = "<arg_key>limit</arg_key><arg_value>{}</arg_value>".format
    (call,) = parse([f"<tool_call>search{pair(1)}{pair(2)}</tool_call>"], False).calls
    assert json.loads(call[1]) == {"limit": 2}


def test_name_is_told_once_before_the_arguments_and_strings_stream():
    parser = OutputParser(thinking=False, reasoning=True, tools=TOOLS)
    pieces = ["<tool_call>get_w", "eather<arg_", "key>city</arg_key><arg_value>Go to ", "Bei", "jing</arg", "_value>"]
    told = [[(delta.kind, delta.text) for delta in parser.feed(piece)] for piece in pieces]
    assert told == [
        [],
        [],
        [("name", "get_weather"), ("arguments", '{"city": "'), ("arguments", "Go to ")],
        [("arguments", "Bei")],
        [("arguments", "jing")],
        [("arguments", '"')],
    ]


def test_without_parsers_tags_are_text():
    text = "r</think>a<tool_call>list_files</tool_call> "
    assert parse(list(text), True, reasoning=False, tools=None).content == text
    only_reasoning = parse(list(text), True, tools=None)
    assert (only_reasoning.reasoning, only_reasoning.content) == ("r", "a<tool_call>list_files</tool_call> ")
    tool_ends_reasoning = parse(list("r<tool_call>x"), True, tools=None)
    assert (tool_ends_reasoning.reasoning, tool_ends_reasoning.content) == ("r", "<tool_call>x")
    only_tools = parse(list(text), True, reasoning=False)
    assert (only_tools.content, only_tools.calls) == ("r</think>a", [["list_files", "{}"]])
