"""The corpus as a whole: what each split may hold, and what a wrong name is told."""

from __future__ import annotations

import itertools
import re

import pytest

from hetero_glm5.demo.corpus import KINDS, MIX, documents, tasks
from hetero_glm5.demo.corpus.chats import MEMORIES, NAME_ASKS
from hetero_glm5.demo.corpus.project import TALK_ROWS
from hetero_glm5.demo.corpus.words import held_out

ASKED = re.compile(r"<\|user\|>(.*?)<\|assistant\|>", re.S)
SUM = re.compile(r"\b(\d+) ([-+*]) (\d+)\b")
GREETINGS = {ask for asks, _ in TALK_ROWS for ask in asks}
ANYWHERE = GREETINGS | {memory[2] for memory in MEMORIES} | set(NAME_ASKS)  # what both splits ask


def questions(kind: str, split: str, count: int) -> set[str]:
    """What the user says last in each turn, without the text it is about."""
    found = documents(kind, split, 7)
    texts = (text.split("\n\n")[-1] for d in itertools.islice(found, count) for text in ASKED.findall(d.text))
    return set(texts)


def test_kinds_and_shares():
    assert tuple(MIX) == KINDS and sum(MIX.values()) == pytest.approx(1)


@pytest.mark.parametrize("call", [lambda: documents("poems", "train", 0), lambda: tasks("poems", 1, 0)])
def test_unknown_kinds_are_refused(call):
    with pytest.raises(ValueError, match="kind is 'poems'; the corpus has sums, tools"):
        call()


def test_unknown_splits_are_refused():
    with pytest.raises(ValueError, match="split is 'test'; use train or held-out"):
        documents("sums", "test", 0)


def same_questions(kind: str, train: int, other: int) -> list[str]:
    trained, held = questions(kind, "train", train), questions(kind, "held-out", other)
    assert min(len(trained), len(held)) > 50
    return sorted((trained & held) - ANYWHERE)


@pytest.mark.parametrize("kind", ["sums", "tools", "project", "chats", "recall"])
def test_no_question_is_in_both_splits(kind):
    assert same_questions(kind, 300 if kind == "recall" else 1500, 400) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sums", "tools", "project", "chats", "recall"])
def test_no_question_is_in_both_splits_of_many(kind):
    assert same_questions(kind, 2000 if kind == "recall" else 20_000, 3000) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "held-out"])
def test_operands_belong_to_their_split_in_every_kind(kind, split):
    pairs = [sum_ for d in itertools.islice(documents(kind, split, 2), 300) for sum_ in SUM.findall(d.text)]
    assert len(pairs) > 500 or kind != "sums"
    for a, _, b in pairs:
        low, high = sorted((int(a), int(b)))
        assert held_out(f"{low} {high}") == (split == "held-out"), (a, b)


@pytest.mark.parametrize("kind", ["sums", "tools", "project", "chats", "recall"])
def test_tasks_are_held_out(kind):
    trained = questions(kind, "train", 300 if kind == "recall" else 1500)
    asked = [str(task.messages[-1]["content"]).split("\n\n")[-1] for task in tasks(kind, 100, 0)]
    assert len(asked) == 100
    assert not set(asked) & trained - ANYWHERE


def test_stories_have_no_tasks():
    assert tasks("stories", 5, 0) == []
