"""When a sequence ends, and which text may be shown: end tokens, stop strings, length.

Text that could be the beginning of a stop string is held back until it is decided; a stop string itself is never shown.
An end token ends the text before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from hetero_glm5.core import Drawn, FinishReason, Sequence, TokenEvent


class TextStream(Protocol):
    """Turns token ids into text as they come, whole characters only."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Detokenizer(Protocol):
    def stream(self) -> TextStream: ...

    def to_str(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        ...


@dataclass
class _Shown:
    """One sequence's text: what its stream gave and has not been shown yet."""

    stream: TextStream
    held: str = field(default="")


class Stopping:
    """`eos` are the model's end tokens. Without a tokenizer (ids in, ids out) stop strings cannot be used."""

    def __init__(self, eos: tuple[int, ...], context_length: int, tokenizer: Detokenizer | None):
        self.eos, self.context_length, self.tokenizer = frozenset(eos), context_length, tokenizer
        self._shown: dict[int, _Shown] = {}

    def event(self, seq: Sequence, drawn: Drawn) -> TokenEvent:
        """Judges the token just drawn and appended to `seq`."""
        token = drawn.token
        matched: int | str | None = token if self._ends(seq, token) else None
        reason: FinishReason | None = None if matched is None else "stop"
        text = ""
        if self.tokenizer is not None:
            shown = self._shown.setdefault(seq.id, _Shown(self.tokenizer.stream()))
            if reason is None:
                shown.held += shown.stream.push(token)
                matched = self._stop_string(seq, shown)
                reason = self._length(seq) if matched is None else "stop"
            text = self._show(seq, shown, reason)
        reason = reason or self._length(seq)
        return TokenEvent(seq, token, text, reason, drawn=drawn, matched=matched)

    def forget(self, seq: Sequence) -> None:
        self._shown.pop(seq.id, None)

    def _ends(self, seq: Sequence, token: int) -> bool:
        if seq.num_output < seq.params.min_tokens:
            return False
        return token in seq.params.stop_token_ids or (token in self.eos and not seq.params.ignore_eos)

    def _length(self, seq: Sequence) -> FinishReason | None:
        most = seq.params.max_tokens
        full = len(seq.tokens) >= self.context_length
        return "length" if full or (most is not None and seq.num_output >= most) else None

    def _stop_string(self, seq: Sequence, shown: _Shown) -> str | None:
        """Cuts the held text at the first stop string in it."""
        found = [(at, stop) for stop in seq.params.stop if (at := shown.held.find(stop)) >= 0]
        if not found or seq.num_output < seq.params.min_tokens:
            return None
        at, stop = min(found)
        shown.held = shown.held[:at]
        return stop

    def _show(self, seq: Sequence, shown: _Shown, reason: FinishReason | None) -> str:
        if reason == "length":
            shown.held += shown.stream.flush()
        keep = 0 if reason else _undecided(shown.held, seq.params.stop)
        cut = len(shown.held) - keep
        text, shown.held = shown.held[:cut], shown.held[cut:]
        return text


def _undecided(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins, or holds, a stop string that may still count."""
    for length in range(min(len(text), max(map(len, stops), default=0)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
