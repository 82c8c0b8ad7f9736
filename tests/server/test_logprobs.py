"""Log-probabilities: told with their text, whatever is held back, and spelled so that no two tokens look alike."""

import pytest

from hetero_glm5.core import Drawn, SamplingParams, Sequence
from hetero_glm5.engine.stopping import Stopping
from hetero_glm5.server.logprobs import Alignment, chat_logprobs, of_prompt, spelled, text_logprobs

END = 3


def answer(tokenizer, tokens: list[int], **params) -> list[tuple[str, list]]:
    """For each event of an answer of those tokens: the text shown, and the tokens told with it."""
    seq = Sequence([1], SamplingParams(stop_token_ids=(END,), **params), 1)
    seq.id = 0
    stopping, alignment, told = Stopping((), 1000, tokenizer), Alignment(tokenizer), []
    for i, token in enumerate(tokens):
        seq.tokens.append(token)
        event = stopping.event(seq, Drawn(token, -float(i)))
        told.append((event.text, alignment.tell(event)))
        if event.finish_reason is not None:
            break
    return told


def test_tokens_come_with_their_text(tokenizer):
    text = "One, two é, three — and four"
    tokens = tokenizer.encode(text)
    for stop in ((), ("three!",), ("q",), ("two é, three — and fourteen",)):
        shown, scored = "", []
        for piece, some in answer(tokenizer, tokens, stop=stop, max_tokens=len(tokens)):
            shown, scored = shown + piece, scored + some
            assert all(one.end <= len(shown) for one in scored)
        assert shown == text and [one.drawn.token for one in scored] == tokens
        told = text_logprobs(scored, tokenizer)
        assert told["token_logprobs"] == [-float(i) for i in range(len(tokens))]
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            assert token.startswith("bytes:") or text[offset:].startswith(token)


def test_what_a_stop_string_takes_back_is_not_told(tokenizer):
    tokens = tokenizer.encode("One, two, three, four")
    told = answer(tokenizer, tokens, stop=("two",))
    shown = "".join(text for text, _ in told)
    spelling = "".join(tokenizer.decode([one.drawn.token]) for _, some in told for one in some)
    assert shown == "One, " and spelling.startswith(shown) and "three" not in spelling
    assert len(spelling) - len(shown) <= len(" two"), "a token that was shown in part is told"


def test_an_end_token_is_the_last_one(tokenizer):
    tokens = [*tokenizer.encode("One"), END]
    told = [one for _, some in answer(tokenizer, tokens, stop=("Only",)) for one in some]
    assert [one.drawn.token for one in told] == tokens and told[-1].start == told[-1].end == len("One")


def test_a_prompt_and_its_answer(tokenizer):
    tokens = tokenizer.encode("Äh, hm")
    drawn = [Drawn(token, -1.5, ((token, -1.5), (5, -2.0))) for token in tokens[1:]]
    told = text_logprobs(of_prompt(tokens, drawn, tokenizer), tokenizer)
    assert told["token_logprobs"] == [None] + [-1.5] * len(drawn)
    assert told["top_logprobs"][0] is None and len(told["top_logprobs"]) == len(tokens)
    ends = [*told["text_offset"][1:], len("Äh, hm")]
    assert "".join("Äh, hm"[a:b] for a, b in zip(told["text_offset"], ends, strict=True)) == "Äh, hm"


def test_the_drawn_token_is_among_the_top_ones(tokenizer):
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    scored = of_prompt([a, b], [Drawn(b, -9.0, ((c, -0.1), (a, float("-inf"))))], tokenizer)[1:]
    assert text_logprobs(scored, tokenizer)["top_logprobs"] == [{"c": -0.1, "a": -9999.0, "b": -9.0}]
    (told,) = chat_logprobs(scored, tokenizer)["content"]
    assert (told["token"], told["logprob"], told["bytes"]) == ("b", -9.0, [98])
    assert [top["token"] for top in told["top_logprobs"]] == ["c", "a"]


@pytest.mark.parametrize("data, text", [(b"ab", "ab"), ("é".encode(), "é"), (b"\xc3", "bytes:\\xc3"), (b"", "")])
def test_spelling(data, text):
    assert spelled(data) == text
