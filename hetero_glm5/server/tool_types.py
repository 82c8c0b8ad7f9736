"""What type a tool's schema gives an argument, and the JSON that a raw argument value becomes.

GLM writes every argument as plain text between tags; the schema decides what it means. Of the types allowed, the first
in the order null, integer, number, boolean, object, array that the text parses as wins; otherwise it is a string.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

_INTEGER = re.compile(r"[+-]?\d{1,4000}")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_MOST_REFERENCES = 100  # that are followed for one argument
_EXACT = 2**53  # above it, not every integral float is the integer that was written


Known = dict[str, tuple[set[str], list[str]]]  # by reference: the types it allows itself, the references it holds


def allowed_types(schema: Any, root: Any, known: Known | None = None) -> frozenset[str]:
    """JSON types that `schema` allows, through unions, enums and local references into `root`. `known`: what `root`'s
    references say, filled here, for the next call.

    A schema that names no type, or an argument without a schema (None), is a string. Clients write schemas: what is
    malformed in one says nothing, a reference is followed once, and what refers to too many may be anything.
    """
    known = {} if known is None else known
    types, references = _union(schema)
    todo, seen = references[:], 0
    followed = set(todo)
    while todo:
        reference = todo.pop()
        if reference not in known:
            known[reference] = _union(_follow(root, reference))
        more, further = known[reference]
        types |= more
        for one in further:
            seen += 1
            if seen > _MOST_REFERENCES:
                return _ANY
            if one not in followed:
                followed.add(one)
                todo.append(one)
    return frozenset(types) or frozenset({"string"})


def _union(schema: Any) -> tuple[set[str], list[str]]:
    """The types that a schema and its unions name, and their references."""
    types: set[str] = set()
    references: dict[str, None] = {}
    todo = [schema]
    while todo:
        part = todo.pop()
        if not isinstance(part, dict):
            continue
        types.update(_own_types(part))
        reference = part.get("$ref")
        if isinstance(reference, str) and reference.startswith("#/"):
            references[reference] = None
        for union in ("anyOf", "oneOf", "allOf"):
            todo += _list(part.get(union))
    return types, list(references)


def _own_types(schema: dict[str, Any]) -> Iterator[str]:
    kinds = schema.get("type")
    if kinds is None:
        values = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
        yield from map(_type_of, values)
    yield from (kind if kind in _ANY else "unknown" for kind in [kinds, *_list(kinds)] if isinstance(kind, str))
    if schema.get("nullable") is True:
        yield "null"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _follow(root: Any, reference: str) -> Any:
    for key in reference[2:].split("/"):
        root = root.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds = {type(None): "null", int: "integer", float: "number", dict: "object", list: "array"}
    return kinds.get(type(value), "string")


def to_json(value: str, types: frozenset[str]) -> str:
    """The JSON text of the raw argument `value`."""
    text = value.strip()
    for kind, parse in _PARSERS.items():
        if kind in types and (parsed := parse(text)) is not None:
            return parsed
    return json.dumps(value, ensure_ascii=False)


def _null(text: str) -> str | None:
    return "null" if text.lower() == "null" else None


def _integer(text: str) -> str | None:
    return str(int(text)) if _INTEGER.fullmatch(text) else None


def _number(text: str) -> str | None:
    if _INTEGER.fullmatch(text) or not _NUMBER.fullmatch(text):
        return _integer(text)
    number = float(text)
    if not math.isfinite(number):
        return None
    return str(int(number)) if number.is_integer() and abs(number) <= _EXACT else repr(number)


def _boolean(text: str) -> str | None:
    return text.lower() if text.lower() in ("true", "false") else None


def _container(kind: type) -> Callable[[str], str | None]:
    def parse(text: str) -> str | None:
        try:
            return text if isinstance(json.loads(text, parse_constant=_refuse), kind) else None
        except (ValueError, RecursionError):
            return None

    return parse


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


_PARSERS: dict[str, Callable[[str], str | None]] = {
    "null": _null,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "object": _container(dict),
    "array": _container(list),
}
_ANY = frozenset({*_PARSERS, "string"})
