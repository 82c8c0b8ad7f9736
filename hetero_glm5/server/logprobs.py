"""Log-probabilities of an answer's tokens, told together with their text, in OpenAI's two shapes.

Text that may begin a stop string is held back, and so are its tokens. A token that a stop string took back altogether
is never told; an end token is, as the last one. A token that is no whole character is spelled as its bytes, so that
different tokens stay different: "bytes:\\xe2\\x96".
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from hetero_glm5.core import Drawn, TokenEvent
from hetero_glm5.server.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no infinity


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, and the characters of the text that it brought: from `start` to `end`."""

    drawn: Drawn
    start: int
    end: int


class Alignment:
    """Feed it one answer's events. offset: characters before its text."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0):
        self._stream = tokenizer.stream()
        self._waiting: deque[Scored] = deque()
        self._made = self._shown = offset  # characters

    def tell(self, told: TokenEvent) -> list[Scored]:
        """The tokens whose text has been shown with this event, or ended."""
        if told.token is not None and told.drawn is not None:
            start, ends = self._made, isinstance(told.matched, int)
            self._made += 0 if ends else len(self._stream.push(told.token))
            self._waiting.append(Scored(told.drawn, start, self._made))
        self._shown += len(told.text)
        ready = []
        while self._waiting and self._is_shown(self._waiting[0], told):
            ready.append(self._waiting.popleft())
        return ready

    def _is_shown(self, scored: Scored, told: TokenEvent) -> bool:
        if isinstance(told.matched, str):
            return scored.start < self._shown
        return told.finish_reason is not None or scored.end <= self._shown


def of_prompt(tokens: list[int], drawn: list[Drawn], tokenizer: Tokenizer) -> list[Scored]:
    """The prompt's tokens, of which the first has no log-probability. drawn: of tokens[1:]."""
    stream, scored, made = tokenizer.stream(), [], 0
    for one in [Drawn(tokens[0]), *drawn]:
        start, made = made, made + len(stream.push(one.token))
        scored.append(Scored(one, start, made))
    return scored


def text_logprobs(scored: list[Scored], tokenizer: Tokenizer) -> dict[str, list[Any]]:
    """In the shape of /v1/completions."""
    return {
        "tokens": [spelled(tokenizer.token_bytes(s.drawn.token)) for s in scored],
        "token_logprobs": [finite(s.drawn.logprob) for s in scored],
        "top_logprobs": [_top(s.drawn, tokenizer) for s in scored],
        "text_offset": [s.start for s in scored],
    }


def chat_logprobs(scored: list[Scored], tokenizer: Tokenizer) -> dict[str, Any]:
    """In the shape of /v1/chat/completions: all tokens, those of the reasoning and of tool calls too."""
    return {
        "content": [
            _chat_token(s.drawn.token, s.drawn.logprob, tokenizer)
            | {"top_logprobs": [_chat_token(token, value, tokenizer) for token, value in s.drawn.top]}
            for s in scored
        ],
        "refusal": None,
    }


def spelled(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)


def _top(drawn: Drawn, tokenizer: Tokenizer) -> dict[str, float | None] | None:
    """The likeliest tokens and the drawn one; None where there is no log-probability."""
    if drawn.logprob is None:
        return None
    likeliest = dict((*drawn.top, (drawn.token, drawn.logprob)))
    return {spelled(tokenizer.token_bytes(token)): finite(value) for token, value in likeliest.items()}


def _chat_token(token: int, logprob: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": spelled(data), "logprob": finite(logprob), "bytes": list(data)}
