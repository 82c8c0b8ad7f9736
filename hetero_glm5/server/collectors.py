"""The collectors of OpenAI's two APIs: engine events in, choices out. They number answers, of which each prompt has
params.n."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import orjson

from hetero_glm5.core import Drawn, SamplingParams, TokenEvent
from hetero_glm5.server.logprobs import Alignment, Scored, chat_logprobs, of_prompt, text_logprobs
from hetero_glm5.server.parsers import Delta, OutputParser, ParsedMessage
from hetero_glm5.server.protocol import CompletionRequest
from hetero_glm5.server.replay import Replay, SampledTurn
from hetero_glm5.server.responses import Usage, chat_choice, chat_chunk_choice, chat_delta, new_call_id, text_choice
from hetero_glm5.server.tokenizer import Tokenizer


def count(usage: Usage, index: int, told: TokenEvent, answers: int) -> None:
    """Adds what the event says to the usage of a request with so many answers for each prompt. A prompt counts once,
    as its first answer found it."""
    usage.completion += told.token is not None
    if told.finish_reason is not None and index % answers == 0:
        usage.cached += told.seq.num_cached or 0


class _Scores:
    """The log-probabilities of one answer: all of them, and those that no chunk has told yet. offset: characters
    before its text."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0):
        self.all: list[Scored] = []
        self._alignment = Alignment(tokenizer, offset)
        self._untold: list[Scored] = []

    def tell(self, told: TokenEvent) -> None:
        scored = self._alignment.tell(told)
        self.all += scored
        self._untold += scored

    def take(self) -> list[Scored]:
        untold, self._untold = self._untold, []
        return untold


class _Echo:
    """What stands before the answers to a prompt, spelt once for all of them, and not before the engine has accepted
    the prompt."""

    def __init__(self, prompt: list[int], tokenizer: Tokenizer, *, shown: bool):
        self._prompt, self._tokenizer, self._shown = prompt, tokenizer, shown
        self._logprobs: dict[str, list[Any]] | None = None

    @cached_property
    def text(self) -> str:
        return self._tokenizer.decode(self._prompt) if self._shown else ""

    def logprobs(self, drawn: list[Drawn] | None) -> dict[str, list[Any]]:
        """In the shape of /v1/completions. drawn: of all its tokens but the first."""
        if self._logprobs is not None:
            return self._logprobs
        scored = [] if drawn is None else of_prompt(self._prompt, drawn, self._tokenizer)
        told = text_logprobs(scored, self._tokenizer)
        if len(scored) == len(self._prompt):  # less if an answer ended before the prompt was read
            self._logprobs = told | {
                "top_logprobs": [orjson.Fragment(orjson.dumps(top)) for top in told["top_logprobs"]]
            }
            return self._logprobs
        return told


class _Text:
    """One choice of a text completion; `echo` stands before its text."""

    def __init__(self, tokenizer: Tokenizer, echo: _Echo, *, scored: bool):
        self._tokenizer, self._echo, self._scored = tokenizer, echo, scored
        self._text = ""
        self._reason: str | None = None
        self._scores: _Scores | None = None
        self._before: dict[str, list[Any]] = {}  # the echo's log-probabilities
        self._begun = self._streamed = False

    def tell(self, index: int, told: TokenEvent) -> Iterator[dict[str, Any]]:
        text, self._reason = told.text, told.finish_reason
        if not self._begun:
            self._begun, text = True, self._echo.text + text
            if self._scored:
                self._scores = _Scores(self._tokenizer, len(self._echo.text))
                self._before = self._echo.logprobs(told.seq.prompt_logprobs)
        if self._scores is not None:
            self._scores.tell(told)
        self._text += text
        return self._chunks(index, text)

    def _chunks(self, index: int, text: str) -> Iterator[dict[str, Any]]:
        if not text and self._reason is None:
            return
        scored = None
        if self._scores is not None:
            scored = text_logprobs(self._scores.take(), self._tokenizer)
            scored = scored if self._streamed else self._after_echo(scored)
        self._streamed = True
        yield text_choice(index, text, self._reason, scored)

    def whole(self, index: int) -> dict[str, Any]:
        scored = None
        if self._scores is not None:
            scored = self._after_echo(text_logprobs(self._scores.all, self._tokenizer))
        return text_choice(index, self._text, self._reason, scored)

    def _after_echo(self, scored: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: self._before[name] + values for name, values in scored.items()}


class TextCollector:
    """/v1/completions: params.n choices for each prompt."""

    def __init__(
        self, asked: CompletionRequest, prompts: list[list[int]], params: SamplingParams, tokenizer: Tokenizer
    ):
        self.usage = Usage(sum(map(len, prompts)))
        self._silent, self._answers = asked.silent, params.n
        echoes = [_Echo(prompt, tokenizer, shown=bool(asked.echo)) for prompt in prompts]
        scored = params.logprobs is not None
        self._choices = [_Text(tokenizer, echo, scored=scored) for echo in echoes for _ in range(params.n)]

    def opening(self) -> list[dict[str, Any]]:
        return []

    def tell(self, index: int, told: TokenEvent) -> Iterable[dict[str, Any]]:
        if self._silent:
            told = TokenEvent(told.seq, None, "", told.finish_reason)
        count(self.usage, index, told, self._answers)
        return self._choices[index].tell(index, told)

    def choices(self) -> list[dict[str, Any]]:
        return [choice.whole(i) for i, choice in enumerate(self._choices)]


class _Message:
    """One choice of a chat. What was sampled goes to `replay`."""

    def __init__(self, parser: OutputParser, tokenizer: Tokenizer, replay: Replay | None, *, scored: bool):
        self.parser, self._tokenizer, self._replay = parser, tokenizer, replay
        self._thinking, self._text = parser.in_reasoning, ""
        self._call_ids: list[str] = []
        self._message, self._reason = ParsedMessage(), "stop"
        self._scores = _Scores(tokenizer) if scored else None

    def tell(self, index: int, told: TokenEvent) -> list[dict[str, Any]]:
        deltas = self.parser.feed(told.text)
        if told.finish_reason is not None:
            deltas += self.parser.finish()
        if self._scores is not None:
            self._scores.tell(told)
        self._text += told.text
        self._message.add(deltas)
        self._call_ids += [new_call_id() for delta in deltas if delta.kind == "name"]
        choices = [chat_chunk_choice(index, chat_delta(delta, self._call_ids)) for delta in _merged(deltas)]
        if told.finish_reason is not None:
            called = told.finish_reason == "stop" and self.parser.num_calls > 0
            self._reason = "tool_calls" if called else told.finish_reason
            if told.finish_reason == "stop" and not self.parser.in_reasoning:
                self._remember()
            choices.append(chat_chunk_choice(index, {}, self._reason))
        if choices and self._scores is not None:
            choices[0]["logprobs"] = chat_logprobs(self._scores.take(), self._tokenizer)
        return choices

    def whole(self, index: int) -> dict[str, Any]:
        scored = None if self._scores is None else chat_logprobs(self._scores.all, self._tokenizer)
        return chat_choice(index, self._message, self._call_ids, self._reason, scored)

    def _remember(self) -> None:
        said = self._message
        calls = tuple((i, *call) for i, call in zip(self._call_ids, said.calls or (), strict=True))
        if self._replay is not None:
            self._replay.remember(SampledTurn(self._text, self._thinking, said.reasoning, said.content, calls))


class ChatCollector:
    """/v1/chat/completions: params.n choices, parsed into reasoning, content and tool calls. Tokens of what the parser
    holds back, or drops, are told with what comes next."""

    def __init__(
        self,
        prompt: list[int],
        parser: Callable[[], OutputParser],
        params: SamplingParams,
        tokenizer: Tokenizer,
        replay: Replay | None,
        *,
        counts_reasoning: bool,
    ):
        self.usage = Usage(len(prompt), reasoning=0 if counts_reasoning else None)
        scored = params.logprobs is not None
        self._choices = [_Message(parser(), tokenizer, replay, scored=scored) for _ in range(params.n)]

    def opening(self) -> list[dict[str, Any]]:
        return [chat_chunk_choice(i, {"role": "assistant", "content": ""}) for i in range(len(self._choices))]

    def tell(self, index: int, told: TokenEvent) -> list[dict[str, Any]]:
        choice = self._choices[index]
        count(self.usage, index, told, len(self._choices))
        if self.usage.reasoning is not None and told.token is not None:
            self.usage.reasoning += choice.parser.in_reasoning
        return choice.tell(index, told)

    def choices(self) -> list[dict[str, Any]]:
        return [choice.whole(i) for i, choice in enumerate(self._choices)]


def _merged(deltas: list[Delta]) -> list[Delta]:
    """Neighbouring deltas that extend the same text, as one."""
    merged: list[Delta] = []
    for delta in deltas:
        last = merged[-1] if merged else None
        if last is not None and last.kind == delta.kind != "name" and last.call == delta.call:
            merged[-1] = Delta(delta.kind, last.text + delta.text, delta.call)
        else:
            merged.append(delta)
    return merged
