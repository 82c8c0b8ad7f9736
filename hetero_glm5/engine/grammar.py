"""Grammars: which tokens an answer may go on with, by llguidance (an Earley parser over a trie of the vocabulary).

A grammar is compiled once and its matcher copied for each sequence; copies share the lexer's automaton and cost
microseconds. Every added token counts as special, whatever its file says, so that a grammar can name <think> and no
string inside a JSON document can turn into one.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from hetero_glm5.core import Grammar, RequestError, Sequence

COMPILED = 64  # grammars kept: an agent sends the same few with every request
MESSAGE = 400  # characters of the compiler's message
TERSE = LLParserLimits(verbose_errors=False)
# A model that pads its JSON could go on for ever between two words.
BLANKS = r"[\x20\x0A\x0D\x09]{1,64}"


class Vocabulary(Protocol):
    def to_str(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        ...


class Grammars:
    """Compiles for one tokenizer. Any of the tokens `eos`, one at least, ends an answer that may end."""

    def __init__(self, vocabulary: Vocabulary, eos: tuple[int, ...]):
        spec = json.loads(vocabulary.to_str())
        for token in spec["added_tokens"]:
            token["special"] = True
        self._tokenizer = LLTokenizer(json.dumps(spec), eos_token=list(eos))
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the beginning of `grammar`. Raises RequestError with the compiler's message. May be called from
        any thread; compiling lets the others run."""
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
                return matcher.deep_copy()
        matcher = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            if len(self._compiled) > COMPILED:
                self._compiled.popitem(last=False)
        return matcher.deep_copy()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            matcher = LLMatcher(self._tokenizer, _rules(grammar), log_level=0, limits=TERSE)
        except ValueError as error:
            raise _refusal(grammar, str(error)) from error
        matcher.compute_bitmask()  # the lexer is made when it is first needed; here is where it may fail or take long
        if matcher.is_error():
            raise _refusal(grammar, matcher.get_error())
        return matcher


def _rules(grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": BLANKS})
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(grammar.text)


def _refusal(grammar: Grammar, message: str) -> RequestError:
    message = " ".join(message.split())
    if len(message) > MESSAGE:
        message = message[:MESSAGE] + " …"
    return RequestError(f"{grammar.param} cannot be used as a grammar: {message}.", grammar.param)


class Constraint:
    """How far one sequence has come in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher, self._vocab_size, self._consumed = matcher, vocab_size, 0

    def allowed(self, seq: Sequence, drafts: tuple[int, ...]) -> tuple[list[NDArray[np.bool_]], str]:
        """Masks [vocab] of the tokens that may follow seq.tokens + drafts[:j], for j = 0, 1, … as far as the grammar
        allows the drafts; what follows a forbidden draft is of no interest. Where the grammar has ended, it is an end
        token. With them a message, empty unless the parser met a limit of its own and the masks end before that."""
        new = seq.tokens[seq.num_prompt + self._consumed :]
        self._matcher.consume_tokens(new)
        self._consumed += len(new)
        matcher = self._matcher.deep_copy() if drafts else self._matcher
        masks: list[NDArray[np.bool_]] = []
        for draft in (*drafts, None):
            words = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            if matcher.is_error():
                return masks, " ".join(matcher.get_error().split())
            masks.append(np.unpackbits(words, count=self._vocab_size, bitorder="little").view(np.bool_))
            if draft is None or not masks[-1][draft]:
                break
            matcher.consume_token(draft)
        return masks, ""
