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
from hetero_glm5.llm import LLM
from hetero_glm5.server.parsers import OutputParser, ParsedMessage

MAX_TOKENS = 256

_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Answer:
    task: Task
    prompt: list[int]  # token ids
    output: list[int]
    text: str
    message: ParsedMessage
    ended: bool  # by an end token, not by the limit

    @property
    def calls(self) -> list[dict[str, Any]] | None:
        """The calls as [{"name", "arguments"}], or None unless they are well-formed: every call that was opened was
        closed, is of an offered tool, and its arguments are an object with all required keys and none unknown."""
        calls = []
        for name, arguments in self.message.calls or ():
            try:
                calls.append({"name": name, "arguments": json.loads(arguments)})
            except ValueError:
                return None
        opened, closed = self.text.count(_OPEN), self.text.count(_CLOSE)
        fits = all(_fits(call, self.task.tools or []) for call in calls)
        return calls if self.ended and opened == closed == len(calls) and fits else None

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


def render(llm: LLM, task: Task) -> str:
    """The prompt. RequestError if the checkpoint has no chat template."""
    return llm.tokenizer.render_chat(task.messages, task.tools, enable_thinking=task.thinking)


def fits(llm: LLM, tasks: list[Task]) -> bool:
    """Whether every prompt leaves room for an answer."""
    longest = max(len(llm.tokenizer.encode(render(llm, task))) for task in tasks)
    return longest + MAX_TOKENS <= llm.engine.context_length


def ask(llm: LLM, tasks: list[Task]) -> list[Answer]:
    """The model's greedy answers, in order."""
    prompts = [render(llm, task) for task in tasks]
    greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    outputs = llm.generate([llm.tokenizer.encode(prompt) for prompt in prompts], greedy)
    return [
        Answer(
            task,
            output.prompt_token_ids,
            output.token_ids,
            output.text or "",
            parse(output.text or "", thinking=prompt.rstrip().endswith("<think>"), tools=task.tools),
            output.finish_reason == "stop",
        )
        for task, prompt, output in zip(tasks, prompts, outputs, strict=True)
    ]


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
    calling = [answer for answer in answers if not isinstance(answer.task.expected, str)]
    well_formed = sum(answer.well_formed for answer in calling) if calling else None
    return Marks(len(answers), sum(answer.right for answer in answers), well_formed)
