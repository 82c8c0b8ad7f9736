"""Grammars for answers that must be JSON, or must call a tool: Lark text for the engine's grammar (llguidance).

    answer := [reasoning </think>] (content | call+)
    call   := <tool_call> name (<arg_key> key </arg_key> <arg_value> value </arg_value>)* </tool_call>

Tags are the tokenizer's own tokens. Text between them is anything but the tag that would end it, spelt out. A
function's arguments come in its schema's order, all that it requires; a value is free text where the schema allows a
string (as the parser reads it, server/tool_types.py), one of the strings of an enum, else JSON of its schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from hetero_glm5.core import MOST_GRAMMAR_CHARACTERS, Grammar, RequestError
from hetero_glm5.engine.grammar_trial import BLANKS
from hetero_glm5.server.tool_types import Known, allowed_types

ANY_JSON: dict[str, Any] = {"type": "object"}
REFERENCES = ("$defs", "definitions")  # where a schema's own parts may lie


def json_answer(schema: dict[str, Any], *, thinking: bool) -> Grammar:
    """JSON of `schema`, after the reasoning if the prompt has opened it."""
    return matching(json_rule(schema), thinking=thinking)


def json_rule(schema: dict[str, Any]) -> str:
    """JSON of `schema`, without endless blanks, as the right-hand side of a rule."""
    return "%json " + json.dumps({"x-guidance": {"whitespace_pattern": BLANKS}} | schema)


def one_of(texts: list[str]) -> str:
    """One of `texts`, as the right-hand side of a rule: a single lexeme, for alternatives of a rule are few."""
    spelt = (re.sub(r"[^\w ]", lambda mark: rf"\x{{{ord(mark[0]):x}}}", text) for text in texts)
    return f"/{'|'.join(spelt)}/"


def matching(
    rule: str,
    *,
    thinking: bool,
    tools: list[dict[str, Any]] | None = None,
    parallel: bool = True,
    source: str | None = None,
) -> Grammar:
    """What the right-hand side `rule` says, or calls of `tools` if there are any; after the reasoning if the prompt has
    opened it. `source`: the request's field that asks for it. Raises RequestError."""
    if not tools:
        return _grammar([f"answer: {rule}"], thinking, source)
    either = [f"answer: content | {_calls(parallel)}", f"content: {rule}"]
    return _grammar(chain(either, _call_rules(tools)), thinking, source)


def tool_calls(tools: list[dict[str, Any]], *, thinking: bool, parallel: bool = True) -> Grammar:
    """At least one call of one of `tools` (OpenAI's form); exactly one if not `parallel`. Raises RequestError."""
    return _grammar(chain([f"answer: {_calls(parallel)}"], _call_rules(tools)), thinking, "tools")


def _calls(parallel: bool) -> str:
    return "call+" if parallel else "call"


def _call_rules(tools: list[dict[str, Any]]) -> Iterator[str]:
    yield f"call: <tool_call> ({' | '.join(f'f{i}' for i in range(len(tools)))}) </tool_call>"
    yield _text("VALUE", "</arg_value>")
    for i, tool in enumerate(tools):
        yield from _function_rules(f"f{i}", tool["function"])


def named(tools: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The tool that has the name. Raises RequestError."""
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        raise RequestError(f"tool_choice names {name[:100]!r}, which is not among the tools.", "tool_choice")
    return found


def _grammar(rules: Iterable[str], thinking: bool, source: str | None) -> Grammar:
    """Raises RequestError as soon as the rules are too long: schemas that are not may make much longer ones."""
    start = "start: REASONING? </think> BLANK? answer" if thinking else "start: answer"
    between = [_text("REASONING", "</think>", "<tool_call>"), r"BLANK: /[ \n]{1,2}/"] if thinking else []
    lines, length = [], 0
    for line in chain([start, *between], rules):
        lines.append(line)
        length += len(line) + 1
        if length > MOST_GRAMMAR_CHARACTERS:
            raise RequestError(
                f"the grammar for {source or 'the answer'} has more than {MOST_GRAMMAR_CHARACTERS} "
                "characters, the most that can be used. Shorten its schemas, or send fewer tools.",
                source,
            )
    return Grammar("lark", "\n".join(lines), source)


def _function_rules(rule: str, function: dict[str, Any]) -> Iterator[str]:
    """The function's name, then an optional group for each argument, or a necessary one."""
    schema = function.get("parameters")
    schema = schema if isinstance(schema, dict) else {}
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    required = schema.get("required")
    required = set(map(str, required)) if isinstance(required, list) else set()
    pairs = [f"{rule}a{i}" if key in required else f"{rule}a{i}?" for i, key in enumerate(properties)]
    yield f"{rule}: {' '.join([json.dumps(function['name']), *pairs])}"
    known: Known = {}
    for i, (key, part) in enumerate(properties.items()):
        value = _value(part, schema, known)
        yield f"{rule}a{i}: <arg_key> {json.dumps(key)} </arg_key> <arg_value> {value} </arg_value>"


def _value(part: Any, root: dict[str, Any], known: Known) -> str:
    """What may stand between a value's tags."""
    kinds = allowed_types(part, root, known)
    choices = part.get("enum") if isinstance(part, dict) else None
    if isinstance(choices, list) and choices and all(isinstance(choice, str) and choice for choice in choices):
        return one_of(choices)
    if "string" in kinds or not isinstance(part, dict):
        return "VALUE?"
    text = json.dumps(part)
    if '"$ref"' in text:
        text = json.dumps({name: root[name] for name in REFERENCES if name in root} | part)
    return f"%json {text}"


def _text(name: str, *ends: str) -> str:
    """A lexeme of any text without the tags that would end it."""
    without = " & ".join(f"~/(.|\\n)*{end.replace('/', chr(92) + '/')}(.|\\n)*/" for end in ends)
    return f"{name}: /(.|\\n)+/ & {without}"
