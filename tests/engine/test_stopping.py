import pytest

from hetero_glm5.core import Drawn, SamplingParams, Sequence
from hetero_glm5.engine.stopping import Stopping

EOS = 0


class Letters:
    """A tokenizer whose token i is the i-th letter; 26 and 27 together are 'é' (two bytes)."""

    def stream(self):
        return LetterStream()


class LetterStream:
    pending = b""

    def push(self, token_id: int) -> str:
        self.pending += {26: b"\xc3", 27: b"\xa9"}.get(token_id, bytes([97 + token_id % 26]))
        try:
            text, self.pending = self.pending.decode(), b""
        except UnicodeDecodeError:
            text = ""
        return text

    def flush(self) -> str:
        text, self.pending = self.pending.decode(errors="replace"), b""
        return text


def run(token_ids, tokenizer=Letters(), context_length=100, **params):  # noqa: B008 (holds no state)
    """Feeds tokens until the end; returns (texts shown, finish reason)."""
    stopping = Stopping((EOS,), context_length, tokenizer)
    seq = Sequence([5, 5], SamplingParams(**params), 2)
    texts = []
    for token in token_ids:
        seq.tokens.append(token)
        event = stopping.event(seq, Drawn(token))
        texts.append(event.text)
        if event.finish_reason:
            return texts, event.finish_reason
    return texts, None


def ids(word: str) -> list[int]:
    return [ord(c) - 97 for c in word]


def test_end_tokens():
    assert run([1, 2, EOS, 3]) == (["b", "c", ""], "stop")
    assert run([1, EOS, 2], ignore_eos=True) == (["b", "a", "c"], None)
    assert run([1, 4, 2], stop_token_ids=(4,)) == (["b", ""], "stop")
    assert run([1, EOS], tokenizer=None) == (["", ""], "stop")


def test_length_by_max_tokens_and_by_context():
    assert run([1, 2, 3], max_tokens=2) == (["b", "c"], "length")
    assert run([1, 2, 3], context_length=4) == (["b", "c"], "length")
    assert run([1, 26], max_tokens=2) == (["b", "�"], "length"), "half a character is shown at the end"


@pytest.mark.parametrize(
    ("word", "stop", "shown", "reason"),
    [
        ("bcdxy", ("cd",), ["b", "", ""], "stop"),
        ("bcxcd", ("cd",), ["b", "", "cx", "", ""], "stop"),
        ("bbbc", ("bbc",), ["", "", "b", ""], "stop"),
        ("bcde", ("cdx", "d"), ["b", "", "c"], "stop"),
        ("bcb", ("cd",), ["b", "", "cb"], None),
        ("xy", ("y", "xy"), ["", ""], "stop"),
    ],
)
def test_stop_strings_are_never_shown(word, stop, shown, reason):
    assert run(ids(word), stop=stop) == (shown, reason)


def test_held_text_is_shown_when_the_length_ends_it():
    assert run(ids("bc"), stop=("cd",), max_tokens=2) == (["b", "c"], "length")


def test_held_text_is_shown_before_an_end_token():
    assert run([*ids("bc"), EOS], stop=("cd",)) == (["b", "", "c"], "stop")


def test_characters_come_whole():
    assert run([26, 27, 1]) == (["", "é", "b"], None)


@pytest.mark.parametrize(
    "params, matched",
    [({}, None), ({"stop": ("cd", "d")}, "cd"), ({"stop": ("zz",), "stop_token_ids": (ids("e")[0],)}, ids("e")[0])],
)
def test_what_ended_it_is_told(params, matched):
    seq = Sequence([1], SamplingParams(max_tokens=5, **params), 1)
    stopping = Stopping((), 100, Letters())
    for token in ids("abcde"):
        seq.tokens.append(token)
        event = stopping.event(seq, Drawn(token))
        if event.finish_reason is not None:
            break
        assert event.matched is None
    assert event.matched == matched and event.finish_reason == ("length" if matched is None else "stop")
