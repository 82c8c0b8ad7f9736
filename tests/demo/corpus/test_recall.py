from __future__ import annotations

import itertools
import re

import pytest

from hetero_glm5.demo.corpus import documents, tasks
from hetero_glm5.demo.corpus.recall import MOST_ASKED, estimate

TURN = re.compile(r"<\|user\|>(.*?)<\|assistant\|>(?:<think>.*?)?</think>(.*?)(?=<\|)", re.S)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_answers_stand_once_in_the_text(split):
    places, asked = [], 0
    for document in itertools.islice(documents("recall", split, 1), 60):
        turns = TURN.findall(document.text)
        body = turns[0][0].rpartition("\n\n")[0]
        for ask, said in turns:
            assert body.count(said) == 1
            assert ask.split("\n\n")[-1].endswith("?")
            places.append(body.index(said) / len(body))
            asked += 1
    assert asked > 200
    thirds = [sum(low <= place < low + 1 / 3 for place in places) / len(places) for low in (0, 1 / 3, 2 / 3)]
    assert min(thirds) > 0.25, "facts stand everywhere in the text"


def test_lengths_spread():
    lengths = [estimate(document.text) for document in itertools.islice(documents("recall", "train", 2), 200)]
    assert min(lengths) < 550 and max(lengths) > 3000
    assert 900 < sum(lengths) / len(lengths) < 1400


def test_subjects_compete():
    """Most documents ask about names that begin alike."""
    alike = 0
    for document in itertools.islice(documents("recall", "train", 3), 100):
        asked = TURN.findall(document.text)
        names = {re.findall(r"[A-Z]\w+", ask.rpartition("\n\n")[2])[-1] for ask, _ in asked}
        alike += len({name[:2] for name in names}) < len(names)
        assert 8 <= len(asked) <= MOST_ASKED
    assert alike > 60


@pytest.mark.parametrize("tokens", [512, 2048])
def test_tasks_have_one_answer_in_the_text(tokens):
    for task in tasks("recall", 40, 0, tokens):
        (message,) = task.messages
        body, _, ask = message["content"].rpartition("\n\n")
        subject = re.findall(r"\b[A-Z]\w+", ask)[1:]
        sentences = [s for s in re.split(r"(?<=[.!?]) ", body) if task.expected in s and all(w in s for w in subject)]
        assert len(sentences) >= 1 and task.tokens == tokens and not task.thinking
        assert estimate(message["content"]) == pytest.approx(tokens, rel=0.04)
