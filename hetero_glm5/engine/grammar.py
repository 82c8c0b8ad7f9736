"""Grammars: which tokens an answer may go on with, by llguidance (an Earley parser over a trie of the vocabulary).

A grammar is tried (grammar_trial.py), then compiled once and its matcher copied for each sequence. A copy costs
microseconds and shares the lexer's automaton, which learns states as it meets them, up to a limit. An added token like
<think> counts as special whatever its file says: a grammar can name it, and no text inside a string turns into it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from hetero_glm5.core import Grammar, RequestError, Sequence
from hetero_glm5.engine.grammar_trial import Trial, compile_grammar

COMPILED = 16  # grammars kept: an agent sends the same few with every request
MESSAGE = 400  # characters of the compiler's message
GAVE_UP = "the grammar's parser gave up: "
LEXER_GAVE_UP = GAVE_UP + "lexer error"
QUICK = 0.1  # seconds that the engine's thread may spend on a grammar compiled anew


class Vocabulary(Protocol):
    def to_str(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        ...


@dataclass
class Compiled:
    """`first`: what the matchers are copies of; None once their automaton is full. `seconds`: what it took to make."""

    first: LLMatcher | None
    seconds: float


class Grammars:
    """Compiles for one tokenizer. Any of the tokens `eos`, one at least, ends an answer that may end."""

    def __init__(self, vocabulary: Vocabulary, eos: tuple[int, ...]):
        text = vocabulary.to_str()
        self._tokenizer = LLTokenizer(text, eos_token=list(eos))
        self._trial = Trial(text, list(eos))
        self._compiled = lru_cache(COMPILED)(self._compile)

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the beginning of `grammar`. Raises RequestError with the compiler's message. May be called from
        any thread; compiling lets the others run."""
        compiled = self._compiled(grammar)
        first = compiled.first = compiled.first or self._made(grammar)
        return first.deep_copy()

    def renew(self, grammar: Grammar) -> bool:
        """Lets its next matchers share an automaton that has learnt nothing. Whether that will be made quickly."""
        compiled = self._compiled(grammar)
        compiled.first = None
        return compiled.seconds <= QUICK

    def close(self) -> None:
        """Ends the process in which grammars are tried."""
        self._trial.close()

    def _compile(self, grammar: Grammar) -> Compiled:
        if refused := self._trial.refusal(grammar.kind, grammar.text):
            raise _refusal(grammar, refused)
        before = time.perf_counter()
        return Compiled(self._made(grammar), time.perf_counter() - before)

    def _made(self, grammar: Grammar) -> LLMatcher:
        try:
            return compile_grammar(self._tokenizer, grammar.kind, grammar.text)
        except ValueError as error:
            raise _refusal(grammar, str(error)) from error


def _refusal(grammar: Grammar, message: str) -> RequestError:
    message = _one_line(message)
    if len(message) > MESSAGE:
        message = message[:MESSAGE] + " …"
    return RequestError(f"{grammar.param} cannot be used as a grammar: {message}.", grammar.param)


def _one_line(message: str) -> str:
    return " ".join(message.replace("<non-verbose/>", "").split())


class Constraint:
    """How far one sequence has come in its grammar. Raises RequestError if it does not compile."""

    def __init__(self, grammars: Grammars, grammar: Grammar, vocab_size: int):
        self._grammars, self._grammar, self._vocab_size = grammars, grammar, vocab_size
        self._begin()

    def _begin(self) -> None:
        self._matcher, self._consumed = self._grammars.matcher(self._grammar), 0

    def allowed(self, seq: Sequence, drafts: tuple[int, ...]) -> tuple[list[NDArray[np.bool_]], str]:
        """Masks [vocab] of the tokens that may follow seq.tokens + drafts[:j], for j = 0, 1, … as far as the grammar
        allows the drafts; what follows a forbidden draft is of no interest. Where the grammar has ended, it is an end
        token. With them a message, empty unless the parser met a limit of its own and the masks end before that."""
        masks, error = self._masks(seq, drafts)
        # Other sequences may have filled the automaton; one that is new tells.
        if error.startswith(LEXER_GAVE_UP) and self._grammars.renew(self._grammar):
            self._begin()
            masks, error = self._masks(seq, drafts)
        return masks, error

    def _masks(self, seq: Sequence, drafts: tuple[int, ...]) -> tuple[list[NDArray[np.bool_]], str]:
        new = seq.tokens[seq.num_prompt + self._consumed :]
        self._matcher.consume_tokens(new)
        self._consumed += len(new)
        matcher = self._matcher.deep_copy() if drafts else self._matcher
        masks: list[NDArray[np.bool_]] = []
        for draft in (*drafts, None):
            words = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            if matcher.is_error():
                return masks, f"{GAVE_UP}{_one_line(matcher.get_error())}"
            masks.append(np.unpackbits(words, count=self._vocab_size, bitorder="little").view(np.bool_))
            if draft is None or not masks[-1][draft]:
                break
            matcher.consume_token(draft)
        return masks, ""
