"""What an answer must match, in the fields of OpenAI (response_format) and of vLLM (structured_outputs, guided_*), as
grammars for the engine. guided_grammar and structured_outputs.grammar are Lark, in llguidance's dialect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hetero_glm5.core import Grammar, RequestError
from hetero_glm5.server.fields import MOST_LEVELS, shown, too_deep
from hetero_glm5.server.tool_grammar import ANY_JSON, json_rule, matching, one_of

FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_grammar", "guided_choice")
Kind = Literal["json", "regex", "grammar", "choice"]


@dataclass(frozen=True)
class Constraint:
    """`value`: a JSON schema, a regular expression, a Lark grammar or a list of strings; `source`: the request's
    field."""

    kind: Kind
    value: Any
    source: str

    def grammar(
        self, tools: list[dict[str, Any]] | None = None, *, thinking: bool = False, parallel: bool = True
    ) -> Grammar:
        """Of the whole answer: after the reasoning if the prompt has opened it, this, or calls of `tools`. Raises
        RequestError."""
        return matching(self._rule(), thinking=thinking, tools=tools, parallel=parallel, source=self.source)

    def _rule(self) -> str:
        """The right-hand side of a Lark rule."""
        if self.kind == "json":
            return json_rule(self.value)
        if self.kind == "choice":
            return one_of(self.value)
        if self.kind == "grammar":
            return f"%lark {{\n{self.value}\n}}"
        slashes = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", self.value, flags=re.DOTALL)
        return f"/{slashes}/".replace("\n", r"\n")


def asked_constraint(fields: Mapping[str, Any]) -> Constraint | None:
    """`fields`: the values of FIELDS. Raises RequestError for what is malformed, and if two ask for something."""
    given = {name: value for name, value in fields.items() if value is not None}
    found = [c for name, value in given.items() if (c := _constraint(name, value)) is not None]
    if len(found) > 1:
        raise RequestError(
            f"{found[0].source} and {found[1].source} both say what the answer must match. Leave one of them out.",
            found[1].source,
        )
    return found[0] if found else None


def _constraint(name: str, value: Any) -> Constraint | None:
    if name == "response_format":
        return _response_format(value)
    if name != "structured_outputs":
        return _checked(name.removeprefix("guided_"), value, name)
    if not isinstance(value, dict):
        raise RequestError(f"structured_outputs is {shown(value)}; it must be an object.", name)
    given = {kind: v for kind, v in value.items() if v is not None and v is not False}
    if len(given) != 1:
        raise RequestError("structured_outputs must name one of json, json_object, regex, grammar and choice.", name)
    ((kind, inner),) = given.items()
    return Constraint("json", ANY_JSON, name) if kind == "json_object" else _checked(kind, inner, name)


def _response_format(value: Any) -> Constraint | None:
    """Schemas are kept to the letter, `strict` or not."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json", ANY_JSON, "response_format")
    if kind != "json_schema":
        raise RequestError(
            f"response_format is of type {shown(kind)}; it must be text, json_object or json_schema.", "response_format"
        )
    inner = value.get("json_schema")
    schema = inner.get("schema", {}) if isinstance(inner, dict) else None
    return _checked("json", schema, "response_format")


def _checked(kind: str, value: Any, source: str) -> Constraint:
    if kind == "json":
        schema = _loaded(value, source) if isinstance(value, str) else value
        if not isinstance(schema, dict):
            raise RequestError(f"{source} needs a JSON schema, an object; it has {shown(schema)}.", source)
        return Constraint("json", schema, source)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            raise RequestError(f"{source} needs a list of strings to choose from, none of them empty.", source)
        return Constraint("choice", value, source)
    if kind == "regex" or kind == "grammar":
        if not isinstance(value, str) or not value:
            raise RequestError(f"{source} needs a {kind} as a string; it has {shown(value)}.", source)
        return Constraint(kind, value, source)
    raise RequestError(f"{source} has {shown(kind)}, which is not supported.", source)


def _loaded(text: str, source: str) -> Any:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{source} is no valid JSON: {error}.", source) from error
    if isinstance(schema, dict) and too_deep(schema):
        raise RequestError(f"{source} is a schema of more than {MOST_LEVELS} levels; send one less deep.", source)
    return schema
