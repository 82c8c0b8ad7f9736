"""Tool documents through the server's real parser: the intended calls, with the types that the tools ask for."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from hetero_glm5.demo.corpus import documents, tasks
from hetero_glm5.demo.corpus.document import Document, assistant, chat
from hetero_glm5.demo.corpus.tool_values import schema, value
from hetero_glm5.demo.corpus.tools import (
    CHAINS,
    LEADS,
    TOOLS,
    chain,
    conversation,
    directory,
    offer,
    pick,
    plain,
    plan,
    single,
)
from hetero_glm5.demo.corpus.words import Draw, held_out
from hetero_glm5.server.parsers import OutputParser, ParsedMessage

TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


def tools_of(document: Document) -> list[dict[str, Any]]:
    shown = re.search(r"<tools>\n(.*?)</tools>", document.text, re.S)
    assert shown
    return [json.loads(line) for line in shown[1].splitlines()]


def turns(document: Document) -> list[ParsedMessage]:
    """What the server makes of each turn that the model writes."""
    parsed = []
    offered = tools_of(document)
    for (before, _), (text, written) in itertools.pairwise(document.pieces):
        if written:
            parser = OutputParser(thinking=before.endswith("<think>"), reasoning=True, tools=offered)
            message = ParsedMessage()
            message.add(parser.feed(re.sub(r"<\|\w+\|>$", "", text)))
            message.add(parser.finish())
            parsed.append(message)
    return parsed


def calls_of(message: ParsedMessage) -> list[dict[str, Any]]:
    return [{"name": name, "arguments": json.loads(arguments)} for name, arguments in message.calls or []]


def is_valid(arguments: dict[str, Any], parameters: dict[str, Any]) -> bool:
    if not set(parameters.get("required", ())) <= set(arguments) <= set(parameters["properties"]):
        return False
    for key, given in arguments.items():
        wanted = parameters["properties"][key]
        if not isinstance(given, TYPES[wanted["type"]]) or isinstance(given, bool) != (wanted["type"] == "boolean"):
            return False
        if given not in wanted.get("enum", [given]):
            return False
    return True


def planned(arguments: dict) -> str:
    texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in arguments.values()]
    pairs = [f'"{key}" = {text}' for key, text in zip(arguments, texts, strict=True)]
    return f" {'; '.join(pairs)}." if pairs else ""


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_every_call_parses_into_what_the_tools_ask_for(split):
    counts = {"calls": 0, "parallel": 0, "none": 0, "thinking": 0}
    for document in itertools.islice(documents("tools", split, 4), 500):
        functions = {tool["function"]["name"]: tool["function"] for tool in tools_of(document)}
        for message in turns(document):
            calls = calls_of(message)
            assert all(is_valid(call["arguments"], functions[call["name"]]["parameters"]) for call in calls)
            steps = message.reasoning or message.content
            assert message.content if not calls else steps == (message.reasoning + message.content)
            assert "<" not in message.content.replace("<sop>", "")
            if calls:
                lines = re.findall(r'#(\d) "(.+?)": ([^=]+) = (.+?) #(\d)\. ', steps)
                shown = [(str(i), name, f["description"]) for i, (name, f) in enumerate(functions.items(), 1)]
                assert [line[:3] for line in lines] == shown and all(line[0] == line[4] for line in lines)
                wanted, number, name, rest = re.findall(r'Wanted: (.+?) #(\d) "(.+?)"\.(.*)', steps)[0]
                assert (number, wanted) in [(line[0], line[3]) for line in lines]
                assert {call["name"] for call in calls} == {name}
                assert rest == "".join(planned(call["arguments"]) for call in calls)
            counts["calls"] += len(calls)
            counts["parallel"] += len(calls) > 1
            counts["none"] += not calls
            counts["thinking"] += bool(message.reasoning)
        written = document.text.count("<tool_call>") - 1  # one in the explanation
        assert written == sum(len(message.calls or []) for message in turns(document))
    assert min(counts.values()) > 40


def test_expected_calls_are_what_the_parser_gives_back():
    counts = {list: 0, str: 0}
    kinds = set()
    for task in tasks("tools", 400, 2):
        counts[type(task.expected)] += 1
        if isinstance(task.expected, str):
            assert task.messages[-1]["role"] == "tool" and task.expected[-1] in '."'
            continue
        functions = [{"function": call} for call in task.expected]
        turn = assistant("", "Because." if task.thinking else "") | {"tool_calls": functions}
        (message,) = turns(chat("tools", [*task.messages, turn], task.tools))
        assert calls_of(message) == task.expected
        kinds |= {type(given) for call in task.expected for given in call["arguments"].values()}
    assert min(counts.values()) > 40 and {str, int, list, bool} <= kinds


def test_answers_quote_their_results():
    for task in tasks("tools", 300, 5):
        if isinstance(task.expected, str):
            said = " ".join(str(message.get("content")) + str(message.get("tool_calls")) for message in task.messages)
            for word in re.findall(r"[A-Z][a-z]{3,}|\d{2,}", task.expected[1:]):
                assert word.lower() in said.lower() + "the your euros", (word, task)


def test_every_tool_has_enough_wordings_for_both_splits():
    draw = Draw("train", "wordings")
    for tool in TOOLS.values():
        wordings = {lead + single(draw, offer(draw, tool))[0] for lead in ("", *LEADS) for _ in range(30)}
        assert {held_out(wording) for wording in wordings} == {True, False}, tool.names


def test_the_table_is_sound():
    assert len(TOOLS) >= 60
    draw = Draw("train", "table")
    for tool in TOOLS.values():
        kinds = [parameter.kind for parameter in tool.parameters] + [kind for _, kind in tool.fields]
        for kind in kinds:
            drawn, said = value(draw, kind)
            assert isinstance(drawn, TYPES[schema(kind)["type"]]), kind
            assert said or kind in ("true", "bool")
        names = {parameter.names[0] for parameter in tool.parameters}
        required = {parameter.names[0] for parameter in tool.parameters if parameter.phrase is None}
        fields = {name for name, _ in tool.fields}
        for text, allowed in ((ask, required) for ask in tool.asks):
            assert set(re.findall(r"{(\w+)}", text)) == allowed, text
        for text in tool.says:
            assert set(re.findall(r"{(\w+)}", text)) <= required | fields, text
        assert not tool.both or (len(required) == 1 and tool.parameters[0].names[0] in required)
        assert len(names) == len(tool.parameters)


@pytest.mark.parametrize("link", CHAINS, ids=lambda link: f"{link[0]}-{link[2]}-{link[3]}")
def test_chains_pass_a_result_on(link):
    draw = Draw("train", "chain")
    offers = {offered.tool.names[0]: offered for offered in pick(draw, 3, [link[0], link[2]])}
    for _ in range(40):
        messages = conversation(draw, chain(draw, link, offers), link, thinking=True)
        if "error" in messages[2]["content"]:
            continue
        passed = json.loads(messages[2]["content"])[link[1]]
        (second,) = messages[3]["tool_calls"]
        assert second["function"]["name"] == offers[link[2]].name
        assert second["function"]["arguments"][offers[link[2]].keys[link[3]]] == passed
        break
    else:
        pytest.fail("every call failed")


def test_a_directory_gives_every_function_with_its_arguments():
    draw = Draw("train", "directory")
    for _ in range(30):
        offers = pick(draw, 6, [], renamed=0.5)
        _, said = directory(draw, offers, thinking=True)
        for tool, line in zip(offers, said["content"].split(" #"), strict=True):
            function = tool.json["function"]
            assert re.findall(r'"(.+?)"', line) == [function["name"], *function["parameters"]["properties"]]
            assert f": {function['description']}" in line and line.startswith((f"{tool.number} ", "#1 "))
    assert said["reasoning_content"] == "I need no tool."


def test_names_vary_and_never_clash():
    draw = Draw("train", "names")
    names = set()
    for _ in range(300):
        offers = pick(draw, 4, [])
        assert len({offered.name for offered in offers}) == 4
        for offered in offers:
            assert len(set(offered.keys.values())) == len(offered.tool.parameters)
            names.add(offered.name)
    assert len(names) > 400


def test_some_names_can_only_be_copied_and_all_is_described():
    draw = Draw("train", "renamed")
    tables = [names for tool in TOOLS.values() for names in (tool.names, *(p.names for p in tool.parameters))]
    known = set(itertools.chain.from_iterable(tables))
    functions = keys = renamed = 0
    for _ in range(200):
        for offered in pick(draw, 4, []):
            function = offered.json["function"]
            properties = function["parameters"]["properties"]
            functions += offered.name not in known
            keys += len(properties)
            renamed += len(set(properties) - known)
            assert all(shown["description"] for shown in (function, *properties.values()))
    assert 150 < functions < 400 and 0.07 * keys < renamed < 0.17 * keys


def test_some_requests_are_descriptions():
    draw = Draw("train", "plain")
    descriptions = [description for tool in TOOLS.values() for description in tool.descriptions]
    asks = [single(draw, offered)[0] for _ in range(200) for offered in pick(draw, 4, [])]
    found = sum(ask.startswith(tuple(descriptions)) for ask in asks)
    assert 0.08 < found / len(asks) < 0.25
    offered = offer(draw, TOOLS["send_money"])
    _, [[call]] = single(draw, offered)
    text = plain(draw, call)
    assert text.endswith(': person "{person}", amount {amount}.') and text.split(":")[0] in offered.tool.descriptions


def test_a_documents_requests_go_round_its_tools():
    different = calls = 0
    for document in itertools.islice(documents("tools", "train", 6), 200):
        names = re.findall(r"<tool_call>([^<{]+)", document.text)
        different, calls = different + len(set(names)), calls + len(names)
    assert different > 0.55 * calls


def test_the_others_on_offer_are_often_related():
    draw = Draw("train", "related")
    others = [
        o.tool.names[0] for _ in range(300) for o in pick(draw, 2, ["read_file"]) if o.tool.names[0] != "read_file"
    ]
    assert 0.3 < sum("file" in name for name in others) / len(others) < 0.9


def test_optional_arguments_are_asked_for_half_of_the_time():
    draw = Draw("train", "optional")
    with_it = 0
    for _ in range(400):
        ask, [[call]] = single(draw, offer(draw, TOOLS["write_file"]))
        with_it += "append" in call.values
        assert ("keep what is there" in ask) == ("append" in call.values)
    assert 150 < with_it < 250


def test_some_function_names_are_never_trained():
    shown = []
    for split, count in (("train", 1500), ("held-out", 300)):
        found = itertools.islice(documents("tools", split, 9), count)
        shown.append({tool["function"]["name"] for document in found for tool in tools_of(document)})
    assert len(shown[1] - shown[0]) > 50 and "get_weather" in shown[0]


def test_the_weather_as_the_openai_client_asks_for_it_is_trained():
    asked = set()
    for document in itertools.islice(documents("tools", "train", 0), 1500):
        asked |= set(re.findall(r"<\|user\|>(What[^<]*weather[^<]*)<", document.text))
    assert any(re.fullmatch(r"What's the weather like in \w+ today\?", ask) for ask in asked)
    assert any(re.fullmatch(r"What is the weather in \w+ and in \w+\?", ask) for ask in asked)
    assert len(asked) > 50


def test_plan():
    draw = Draw("train", "plan")
    offered = offer(draw, TOOLS["roll_dice"])
    _, [calls] = single(draw, offered)
    first, second = calls[0].arguments.items()
    told, values = (
        f'Wanted: roll dice #1 "{offered.name}".',
        f' "{first[0]}" = {first[1]}; "{second[0]}" = {second[1]}.',
    )
    assert plan(calls) == told + values and plan(calls * 2) == told + values * 2
