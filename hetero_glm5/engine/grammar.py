"""Grammars: which tokens an answer may go on with, by llguidance (an Earley parser over a trie of the vocabulary).

A grammar is compiled once and its matcher copied for each sequence. A copy costs microseconds and shares the lexer's
automaton, which learns states as it meets them, up to a limit. An added token like <think> counts as special whatever
its file says: a grammar can name it, and no text inside a string turns into it.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from hetero_glm5.core import Grammar, RequestError, Sequence

COMPILED = 16  # grammars kept: an agent sends the same few with every request
MESSAGE = 400  # characters of the compiler's message
# A lexer state takes 1 to 2 kB. Alternatives and ambiguous rules make items (a tool that may be called: two); a step of
# many thousands would hold up all neighbours.
LIMITS = LLParserLimits(max_lexer_states=50_000, max_items_in_row=2_000, step_max_items=10_000, verbose_errors=False)
GAVE_UP = "the grammar's parser gave up: "
LEXER_GAVE_UP = GAVE_UP + "lexer error"
# For multipleOf the compiler follows each remainder, of the least common multiple where several meet, and no limit of
# its own stops it: 3,000,017 takes 25 s and 1.5 GB. Powers of ten cost nothing.
MOST_REMAINDERS = 100_000
# A model that pads its JSON could go on for ever between two words.
BLANKS = r"[\x20\x0A\x0D\x09]{1,64}"


class Vocabulary(Protocol):
    def to_str(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        ...


class Grammars:
    """Compiles for one tokenizer. Any of the tokens `eos`, one at least, ends an answer that may end."""

    def __init__(self, vocabulary: Vocabulary, eos: tuple[int, ...]):
        self._tokenizer = LLTokenizer(vocabulary.to_str(), eos_token=list(eos))
        self._compiled = lru_cache(COMPILED)(lambda grammar: [self._compile(grammar)])

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the beginning of `grammar`. Raises RequestError with the compiler's message. May be called from
        any thread; compiling lets the others run."""
        return self._compiled(grammar)[0].deep_copy()

    def renew(self, grammar: Grammar) -> None:
        """Compiles it once more: its next matchers share an automaton that has learnt nothing."""
        self._compiled(grammar)[0] = self._compile(grammar)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        _check_multiples(grammar)
        try:
            matcher = LLMatcher(self._tokenizer, _rules(grammar), log_level=0, limits=LIMITS)
        except ValueError as error:
            raise _refusal(grammar, str(error)) from error
        matcher.compute_bitmask()  # the lexer is made when it is first needed; here is where it may fail or take long
        if matcher.is_error():
            raise _refusal(grammar, matcher.get_error())
        return matcher


def _check_multiples(grammar: Grammar) -> None:
    """Wherever the text has a schema with multipleOf, however that is spelt."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda escaped: chr(int(escaped[1], 16)), grammar.text)
    remainders = 1
    for number in re.findall(r'"multipleOf"\s*:\s*([0-9.]+)', text):
        digits = number.replace(".", "").strip("0")[:12] or "1"
        remainders = math.lcm(remainders, int(digits))
        if remainders > MOST_REMAINDERS:
            raise RequestError(
                f"{grammar.param} has a multipleOf of {number[:40]}; without the zeros at its end, and as the least "
                f"common multiple of all that it has, at most {MOST_REMAINDERS} can be kept to. Leave multipleOf out.",
                grammar.param,
            )


def _rules(grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": BLANKS})
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(grammar.text)


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
        if error.startswith(LEXER_GAVE_UP):  # other sequences may have filled the automaton; one that is new tells
            self._grammars.renew(self._grammar)
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
