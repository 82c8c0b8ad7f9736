"""What the APIs of agents share: a conversation becomes a prompt, and its answer the parts of an assistant's turn.

A part is a run of reasoning, a run of text or one tool call. /v1/messages and /v1/responses each have a teller that
puts parts into their own words; what happened is decided here.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import orjson
from fastapi import Request, Response

from hetero_glm5.core import Grammar, RequestError, SamplingParams, TokenEvent
from hetero_glm5.server.guard import request_id
from hetero_glm5.server.parsers import Delta, OutputParser
from hetero_glm5.server.replay import SampledTurn
from hetero_glm5.server.responses import Usage
from hetero_glm5.server.streaming import Teller, patience, reply
from hetero_glm5.server.tool_grammar import json_rule, matching, named, tool_calls

if TYPE_CHECKING:
    from hetero_glm5.server.service import Service


@dataclass(frozen=True)
class Asked:
    """What an assistant's turn is asked for. `messages` and `tools` have OpenAI's form; `choice` is the tool_choice:
    auto, none, required, or "only" the `function`; `schema` is what text must be JSON of, from the field
    `schema_field`."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    params: SamplingParams
    choice: Literal["auto", "none", "required", "only"] = "auto"
    function: str = ""
    parallel: bool = True
    schema: dict[str, Any] | None = None
    schema_field: str | None = None
    template: dict[str, Any] = field(default_factory=dict)

    def grammar(self, thinking: bool) -> Grammar | None:
        """What the answer must match; None when it may be anything. Raises RequestError."""
        if self.choice in ("required", "only"):
            callable_ones = named(self.tools, self.function) if self.choice == "only" else self.tools
            return tool_calls(callable_ones, thinking=thinking, parallel=self.parallel)
        if self.schema is None:
            return None
        return matching(
            json_rule(self.schema),
            thinking=thinking,
            tools=self.offered,
            parallel=self.parallel,
            source=self.schema_field,
        )

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call; None when it may call none. Raises RequestError."""
        if self.choice == "none":
            return None
        if self.choice != "auto" and not self.tools:
            raise RequestError("tool_choice asks for a call, and there are no tools to call.", "tool_choice")
        return self.tools or None


@dataclass
class Part:
    """A run of reasoning or text, or a tool call; a call's `text` is its arguments, JSON once it is complete."""

    kind: Literal["reasoning", "content", "call"]
    index: int
    id: str
    name: str = ""
    text: str = ""

    @property
    def arguments(self) -> dict[str, Any] | None:
        """None for a call that the answer's end cut off."""
        try:
            return orjson.loads(self.text)
        except orjson.JSONDecodeError:
            return None


Change = tuple[Literal["open", "more", "close"], Part, str]


class Turn:
    """An assistant's turn: its prompt, then its parts as they come. `call_prefix` begins the ids of its tool calls.

    Making it renders and encodes the prompt, which may take long. Raises RequestError.
    """

    def __init__(self, service: Service, asked: Asked, call_prefix: str):
        offered = asked.offered
        if offered is not None and service.config.tool_call_parser is None:
            raise RequestError("tools need a server started with --tool-call-parser glm47.", "tools")
        text = service.replay.render(service.tokenizer, asked.messages, offered, **asked.template)
        self.prompt = service.encode(text)
        opened, parses = text.rstrip().endswith("<think>"), service.config.reasoning_parser is not None
        self._thinking, self._replays = opened and parses, parses or not opened
        params = replace(asked.params, grammar=asked.grammar(self._thinking))
        self.params = service.fitting(params, self.prompt)
        self._parser = OutputParser(thinking=self._thinking, reasoning=parses, tools=offered, parallel=asked.parallel)
        self._replay, self._prefix = service.replay, call_prefix
        self.usage = Usage(len(self.prompt), reasoning=0)
        self.parts: list[Part] = []
        self._open = False  # the last part may grow
        self._text = ""
        self.finish_reason: str | None = None
        self.stop_string: str | None = None

    @property
    def called(self) -> bool:
        """Whether it ended with tool calls."""
        return self.finish_reason == "stop" and any(part.kind == "call" for part in self.parts)

    def tell(self, told: TokenEvent) -> list[Change]:
        """What an event changes."""
        if told.token is not None:
            self.usage.completion += 1
            self.usage.reasoning += self._parser.in_reasoning
        self._text += told.text
        deltas = self._parser.feed(told.text)
        if told.finish_reason is None:
            return self._changes(deltas)
        changes = self._changes(deltas + self._parser.finish()) + self._closing()
        self.usage.cached = told.seq.num_cached or 0
        self.finish_reason = told.finish_reason
        self.stop_string = told.matched if isinstance(told.matched, str) else None
        if self.finish_reason == "stop" and self._replays and not self._parser.in_reasoning:
            self._remember()
        return changes

    def _changes(self, deltas: list[Delta]) -> list[Change]:
        changes: list[Change] = []
        for delta in deltas:
            kind = delta.kind if delta.kind in ("reasoning", "content") else "call"
            if delta.kind == "name" or not self._open or self.parts[-1].kind != kind:
                changes += [*self._closing(), ("open", self._opening(kind), "")]
            part = self.parts[-1]
            if delta.kind == "name":
                part.name = delta.text
                continue
            part.text += delta.text
            told = changes.pop()[2] if changes and changes[-1][0] == "more" else ""
            changes.append(("more", part, told + delta.text))
        return changes

    def _opening(self, kind: Any) -> Part:
        self.parts.append(Part(kind, len(self.parts), f"{self._prefix}{secrets.token_hex(12)}"))
        self._open = True
        return self.parts[-1]

    def _closing(self) -> list[Change]:
        was_open, self._open = self._open, False
        return [("close", self.parts[-1], "")] if was_open else []

    def _remember(self) -> None:
        def told(kind: str) -> str:
            return "".join(part.text for part in self.parts if part.kind == kind)

        calls = tuple((part.id, part.name, part.text) for part in self.parts if part.kind == "call")
        self._replay.remember(SampledTurn(self._text, self._thinking, told("reasoning"), told("content"), calls))


class TurnTeller(Teller, Protocol):
    """A turn in an API's words. `id` is the answer's."""

    turn: Turn
    id: str

    def tell(self, index: int, told: TokenEvent) -> Iterable[bytes]:
        return (event for change in self.turn.tell(told) for event in self.say(*change))

    def say(self, what: str, part: Part, text: str) -> list[bytes]:
        """The events of one change."""
        ...


async def answer(service: Service, request: Request, teller: TurnTeller, *, streams: bool) -> Response:
    """Raises like EngineWorker.submit, and GenerationFailed."""
    turn, names = teller.turn, frozenset((teller.id, request_id(request)))
    generation = await service.worker.submit([turn.prompt], turn.params, patience(), names=names)
    return await reply(request, service.worker, generation, teller, streams)


async def make_turn(service: Service, asked: Callable[[], Asked], call_prefix: str) -> Turn:
    """In a thread, `asked` too: a conversation may be long."""
    return await asyncio.to_thread(lambda: Turn(service, asked(), call_prefix))


def named_event(body: dict[str, Any]) -> bytes:
    """One server-sent event that is called what its type is."""
    return f"event: {body['type']}\ndata: ".encode() + orjson.dumps(body) + b"\n\n"
