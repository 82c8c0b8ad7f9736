"""What the demo model learns from: seeded generators of six kinds of text, and held-out questions about each.

sums      additions, subtractions and small products, worked out digit by digit
tools     calls of tools that the prompt describes, and answers from their results
project   questions about this project, and small talk
stories   short stories
chats     several turns, system prompts, small lists, what the user said before
recall    facts found again in long documents

python -m hetero_glm5.demo.corpus OUT [--split train] [--seed 0] [--documents N]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hetero_glm5.demo.corpus import chats, project, recall, stories, sums, tools
from hetero_glm5.demo.corpus.document import Document, Task, render
from hetero_glm5.demo.corpus.words import Draw

__all__ = ["KINDS", "MIX", "Document", "Task", "documents", "render", "tasks"]

_KINDS = {"sums": sums, "tools": tools, "project": project, "stories": stories, "chats": chats, "recall": recall}
KINDS = tuple(_KINDS)
MIX = {"sums": 0.09, "tools": 0.51, "project": 0.05, "stories": 0.05, "chats": 0.12, "recall": 0.18}  # of all tokens


def documents(kind: str, split: str, seed: int) -> Iterator[Document]:
    """Endless; the same arguments give the same documents. `split` is train or held-out: no question, value or fact
    is in both."""
    return _module(kind).documents(Draw(split, kind, seed))


def tasks(kind: str, count: int, seed: int, tokens: int = 0) -> list[Task]:
    """`count` held-out questions with what their answers must hold. `tokens`, for recall: about how long each document
    is. Stories have none."""
    return list(itertools.islice(_module(kind).tasks(Draw("held-out", kind, "tasks", seed), tokens), count))


def _module(kind: str):
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}; the corpus has {', '.join(KINDS)}.")
    return _KINDS[kind]
