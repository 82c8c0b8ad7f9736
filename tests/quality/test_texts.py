"""Documents as token ids, and which of them are the model's."""

import pytest
from tiny import tiny_checkpoint

from hetero_glm5.demo.corpus import KINDS, Document, documents
from hetero_glm5.quality.texts import encode, held_out, long
from hetero_glm5.server.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return Tokenizer.from_folder(tiny_checkpoint(checkpoints))


def test_pieces_keep_their_owner(tokenizer):
    document = Document("sums", (("[gMASK]<sop><|user|>", False), ("1+1<|assistant|>", False), ("2<|user|>", True)))
    text = encode(document, tokenizer)
    assert tokenizer.decode(text.ids) == document.text and len(text) == len(text.own)
    assert tokenizer.decode([i for i, own in zip(text.ids, text.own, strict=True) if own]) == "2<|user|>"
    cut = text.cut(3)
    assert (cut.ids, cut.own, cut.kind) == (text.ids[:3], text.own[:3], "sums")


@pytest.mark.parametrize("kind", KINDS)
def test_turns_are_encoded_as_the_server_would(tokenizer, kind):
    """A prompt as a whole, then what the model adds: special tokens stand between them, so nothing can merge."""
    document = next(documents(kind, "held-out", 5))
    text = encode(document, tokenizer)
    assert text.ids == tokenizer.encode(document.text) and text.kind == kind
    assert any(text.own) and not text.own[0]


def test_held_out_documents_are_whole_enough_and_the_same_again(tokenizer):
    texts = held_out(tokenizer, "sums", 0, 500, 10**6)
    assert sum(map(len, texts)) >= 500 > sum(map(len, texts[:-1]))
    assert texts == held_out(tokenizer, "sums", 0, 500, 10**6) != held_out(tokenizer, "sums", 1, 500, 10**6)
    assert max(map(len, held_out(tokenizer, "sums", 0, 500, 40))) == 40


def test_long_texts_are_documents_of_that_length(tokenizer):
    texts = long(tokenizer, "stories", 0, 500, 3)
    assert len({tuple(text.ids) for text in texts}) == 3 and all(375 <= len(text) <= 625 for text in texts)
    begin = tokenizer.encode("[gMASK]")
    assert all(text.ids.count(*begin) == 1 for text in texts)


def test_where_there_are_none_documents_follow_each_other(tokenizer):
    first, second = long(tokenizer, "sums", 0, 5000, 2)
    assert len(first) == len(first.own) == len(second) == 5000 and first.ids != second.ids
    whole = [i for text in held_out(tokenizer, "sums", 0, 5000, 10**6) for i in text.ids]
    assert first.ids == whole[:5000]
