"""Held-out documents as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from hetero_glm5.demo.corpus import Document, documents
from hetero_glm5.server.tokenizer import Tokenizer


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


def packed(tokenizer: Tokenizer, kind: str, seed: int, length: int, count: int) -> list[Text]:
    """`count` texts of exactly `length` tokens: documents of one kind, one after the other."""
    texts = []
    stream = _encoded(tokenizer, kind, seed)
    for _ in range(count):
        ids: list[int] = []
        own: list[bool] = []
        while len(ids) < length:
            text = next(stream)
            ids += text.ids
            own += text.own
        texts.append(Text(kind, ids, own).cut(length))
    return texts


def _encoded(tokenizer: Tokenizer, kind: str, seed: int) -> Iterator[Text]:
    return (encode(document, tokenizer) for document in documents(kind, "held-out", seed))
