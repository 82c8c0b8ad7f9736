"""Held-out questions, asked as the server would ask them, and how good the answers are.

A prompt is the checkpoint's chat template over a task's messages and tools; decoding is greedy; the server's own parser
splits the output. An answer is right if its content holds the expected words or number (a sum's: as its last number),
or if it makes the expected calls, in order, with equal arguments after typing. It has then ended by itself.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from hetero_glm5.core import SamplingParams
from hetero_glm5.demo.corpus import Task
from hetero_glm5.llm import LLM, Output, Prompt
from hetero_glm5.server.parsers import OutputParser, ParsedMessage
from hetero_glm5.server.tokenizer import Tokenizer

MAX_TOKENS = 384

_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
_TAGS = ("tool_call", "arg_key", "arg_value")


@dataclass(frozen=True)
class Answer:
    task: Task
    prompt: list[int]  # token ids
    output: list[int]
    text: str
    message: ParsedMessage
    ended: bool  # by an end token, not by the limit

    @classmethod
    def of(cls, task: Task, output: Output) -> Answer:
        text, ended = output.text or "", output.finish_reason == "stop"
        message = parse(text, thinking=task.thinking, tools=task.tools)
        return cls(task, output.prompt_token_ids, output.token_ids, text, message, ended)

    @property
    def calling(self) -> bool:
        """Whether calls are expected."""
        return not isinstance(self.task.expected, str)

    @property
    def calls(self) -> list[dict[str, Any]] | None:
        """The calls as [{"name", "arguments"}], or None unless they are well-formed: every tag that was opened was
        closed, every call is of an offered tool, and its arguments have all required keys and none unknown."""
        calls = []
        for name, arguments in self.message.calls or ():
            try:
                calls.append({"name": name, "arguments": json.loads(arguments)})
            except ValueError:
                return None
        closed = all(self.text.count(f"<{tag}>") == self.text.count(f"</{tag}>") for tag in _TAGS)
        whole = self.ended and closed and len(calls) == self.text.count(f"<{_TAGS[0]}>")
        return calls if whole and all(_fits(call, self.task.tools or []) for call in calls) else None

    @property
    def well_formed(self) -> bool:
        """Whether there are calls, all well-formed."""
        return bool(self.calls)

    @property
    def right(self) -> bool:
        expected = self.task.expected
        if not isinstance(expected, str):
            return same(self.calls, expected)
        if not self.ended or self.message.calls:
            return False
        if self.task.kind == "sums":
            return _NUMBER.findall(self.message.content)[-1:] == [expected]
        return says(self.message.content, expected)


def says(content: str, expected: str) -> bool:
    """Whether `expected` stands in `content`, not as a part of a longer word or number."""
    before = r"(?<![\w.,-])" if expected[:1].isdigit() else r"(?<!\w)" if re.match(r"\w", expected) else ""
    after = r"(?![.,]?\w)" if expected[-1:].isdigit() else r"(?!\w)" if re.search(r"\w\Z", expected) else ""
    return re.search(before + re.escape(expected) + after, content) is not None


def _fits(call: dict[str, Any], tools: list[dict[str, Any]]) -> bool:
    function = next(tool["function"] for tool in tools if tool["function"]["name"] == call["name"])
    schema, given = function.get("parameters") or {}, set(call["arguments"])
    return set(schema.get("required", ())) <= given <= set(schema.get("properties", ()))


def same(a: Any, b: Any) -> bool:
    """Equality of JSON values: 2.0 is 2, but true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def prompts(tokenizer: Tokenizer, tasks: list[Task]) -> list[list[int]]:
    """Token ids up to where the answer begins. RequestError if the checkpoint has no chat template."""
    texts = (tokenizer.render_chat(task.messages, task.tools, enable_thinking=task.thinking) for task in tasks)
    return [tokenizer.encode(text) for text in texts]


def ask(llm: LLM, tokenizer: Tokenizer, tasks: list[Task]) -> list[Answer]:
    """The model's greedy answers, in order; none at all if a prompt leaves too little of the context for one."""
    asked: list[Prompt] = [*prompts(tokenizer, tasks)]
    if max(map(len, asked), default=0) + MAX_TOKENS > llm.engine.context_length:
        return []
    outputs = llm.generate(asked, SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0))
    return [Answer.of(task, output) for task, output in zip(tasks, outputs, strict=True)]


def parse(text: str, *, thinking: bool, tools: list[dict[str, Any]] | None) -> ParsedMessage:
    parser = OutputParser(thinking=thinking, reasoning=True, tools=tools)
    message = ParsedMessage()
    message.add(parser.feed(text))
    message.add(parser.finish())
    return message


@dataclass(frozen=True)
class Marks:
    """How many of the `asked` questions were answered right; `well_formed` counts calls, where they were expected."""

    asked: int
    right: int
    well_formed: int | None = None


def mark(answers: list[Answer]) -> Marks:
    calling = [answer for answer in answers if answer.calling]
    well_formed = sum(answer.well_formed for answer in calling) if calling else None
    return Marks(len(answers), sum(answer.right for answer in answers), well_formed)
