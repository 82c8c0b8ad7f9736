"""Compiles each new grammar in a process that it may take down.

The compiler recurses without a limit, and for some grammars of a few bytes its own limits do not hold: intersections,
multiples of large numbers. A grammar is therefore tried in a process with little stack, memory and time; the one that
serves compiles it again if that went well. The process is started when it is first needed. It runs this file alone, so
that it is there within a tenth of a second, and ends with whoever started it: what compiling needs stands here.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# A lexer state takes 1 to 2 kB. Alternatives and ambiguous rules make items (a tool that may be called: two); a step of
# many thousands would hold up all neighbours.
LIMITS = LLParserLimits(max_lexer_states=50_000, max_items_in_row=2_000, step_max_items=10_000, verbose_errors=False)
# A model that pads its JSON could go on for ever between two words.
BLANKS = r"[\x20\x0A\x0D\x09]{1,64}"

MOST_CPU_SECONDS, MOST_BYTES = 2.0, 64 << 20
STACK = 1 << 20  # bytes; a thread that serves has at least twice as much
MOST_MASK_SECONDS = 0.02  # of a core, for one token's mask
TOO_MUCH = f"to compile it takes more than {MOST_CPU_SECONDS:g} s or {MOST_BYTES >> 20} MiB, or it nests too deeply"


def compile_grammar(tokenizer: LLTokenizer, kind: str, text: str) -> LLMatcher:
    """kind: a core.GrammarKind. Raises ValueError with the compiler's message."""
    if kind == "json_schema":
        text = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": BLANKS})
    elif kind == "regex":
        text = LLMatcher.grammar_from_regex(text)
    else:
        text = LLMatcher.grammar_from_lark(text)
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
    matcher.compute_bitmask()  # the lexer is made when it is first needed; here is where it may fail or take long
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


class Trial:
    """For one tokenizer, as the text of its tokenizer.json. Any thread may use it."""

    def __init__(self, tokenizer: str, eos: list[int]):
        self._tokenizer, self._eos = tokenizer, eos
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    def refusal(self, kind: str, text: str) -> str:
        """Why the grammar cannot be used; empty if it can."""
        with self._turn:
            process = self._process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                print(json.dumps([kind, text]), file=process.stdin, flush=True)
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if answer:
                return json.loads(answer)
            self._end()
            return TOO_MUCH

    def close(self) -> None:
        with self._turn:
            self._end()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # an interrupt at the terminal is not for it
        )
        assert process.stdin is not None
        print(json.dumps([self._tokenizer, self._eos]), file=process.stdin, flush=True)
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _tried(tokenizer: LLTokenizer, kind: str, text: str) -> str:
    try:
        matcher = compile_grammar(tokenizer, kind, text)
    except ValueError as error:
        return str(error)
    quickest = min(_mask_seconds(matcher) for _ in range(3))
    if quickest > MOST_MASK_SECONDS:
        return f"each token would take {1000 * quickest:.0f} ms, at most {1000 * MOST_MASK_SECONDS:.0f} are allowed"
    return ""


def _mask_seconds(matcher: LLMatcher) -> float:
    copy = matcher.deep_copy()
    before = time.thread_time()
    copy.compute_bitmask()
    return time.thread_time() - before


def _serve() -> None:
    """Reads a tokenizer and grammars, a line each, and answers each grammar with a line."""
    text, eos = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(text, eos_token=eos)
    _tried(tokenizer, "regex", "a")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, MOST_CPU_SECONDS)  # ends the process
        answer = _tried(tokenizer, *json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    threading.stack_size(STACK)
    serving = threading.Thread(target=_serve)
    serving.start()
    serving.join()
