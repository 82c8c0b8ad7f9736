"""Held-out documents as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice

from hetero_glm5.demo.corpus import Document, documents
from hetero_glm5.server.tokenizer import Tokenizer

LOOKED = 200


@dataclass(frozen=True)
class Text:
    """own[i]: whether token i is the model's to write; prompts and tool results are not."""

    kind: str
    ids: list[int]
    own: list[bool]

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> Text:
        return Text(self.kind, self.ids[:length], self.own[:length])


def encode(document: Document, tokenizer: Tokenizer) -> Text:
    """Each turn is encoded by itself, as in serving: a prompt first, and then what the model adds to it."""
    ids: list[int] = []
    own: list[bool] = []
    for writes, pieces in groupby(document.pieces, key=lambda piece: piece[1]):
        added = tokenizer.encode("".join(text for text, _ in pieces))
        ids += added
        own += [writes] * len(added)
    return Text(document.kind, ids, own)


def held_out(tokenizer: Tokenizer, kind: str, seed: int, tokens: int, longest: int) -> list[Text]:
    """Whole documents of one kind until there are `tokens`; each is cut after `longest`."""
    texts: list[Text] = []
    stream = _encoded(tokenizer, kind, seed)
    while sum(map(len, texts)) < tokens:
        texts.append(next(stream).cut(longest))
    return texts


def long(tokenizer: Tokenizer, kind: str, seed: int, length: int, count: int) -> list[Text]:
    """`count` documents of one kind of about `length` tokens, a quarter more or less. Where the first LOOKED have too
    few such, several in a row make one text of `length`."""
    stream = islice(_encoded(tokenizer, kind, seed), LOOKED)
    found = list(islice((text for text in stream if 4 * abs(len(text) - length) <= length), count))
    return found if len(found) == count else _packed(_encoded(tokenizer, kind, seed), length, count)


def _packed(stream: Iterator[Text], length: int, count: int) -> list[Text]:
    texts = []
    for _ in range(count):
        text = next(stream)
        while len(text) < length:
            more = next(stream)
            text = Text(text.kind, text.ids + more.ids, text.own + more.own)
        texts.append(text.cut(length))
    return texts


def _encoded(tokenizer: Tokenizer, kind: str, seed: int) -> Iterator[Text]:
    return (encode(document, tokenizer) for document in documents(kind, "held-out", seed))
