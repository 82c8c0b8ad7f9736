"""Long documents with facts among other sentences, and questions about the facts, answered in the fact's own words."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hetero_glm5.demo.corpus import stories
from hetero_glm5.demo.corpus.document import Document, Task, assistant, chat, user
from hetero_glm5.demo.corpus.tool_values import DAYS
from hetero_glm5.demo.corpus.words import ANIMALS, COLOURS, FOODS, ROOMS, THINGS, Draw, held_out

KIND = "recall"
MOST_ASKED = 16  # of one document
RELATIONS = (  # the fact, the question, and what of the fact the answer must hold
    ("The code of the {colour} {thing} is {number}.", "What is the code of the {colour} {thing}?", "{number}"),
    ("The code of {name} is {number}.", "What is the code of {name}?", "{number}"),
    ("{name} keeps the {thing} in the {room}.", "Where does {name} keep the {thing}?", "in the {room}"),
    ("{name} lives in {place}.", "Where does {name} live?", "{place}"),
    ("The {animal} of {name} is called {pet}.", "What is the {animal} of {name} called?", "{pet}"),
    ("{name} comes on {day}.", "When does {name} come?", "{day}"),
    ("{name} likes {food} best.", "What does {name} like best?", "{food}"),
    ("{name} paid {number} coins for the {thing}.", "What did {name} pay for the {thing}?", "{number} coins"),
    ("The {thing} of {name} is {colour}.", "What colour is the {thing} of {name}?", "{colour}"),
    ("The password of {place} is {pet}.", "What is the password of {place}?", "{pet}"),
)  # fmt: skip
LEADS = ("Read this text. ", "Here is a text. ", "Remember this. ", "")
TOKEN = re.compile(r"[0-9]| ?[a-z]+|[A-Z][a-z]*| ?[^\sA-Za-z0-9]+|\s")
_BETWEEN = re.compile(r'(?<=[.!?]) (?=[A-Z"])|(?<=[.!?]") (?=[A-Z"])')  # sentences of a story

Fact = tuple[str, str, str]


def estimate(text: str) -> float:
    """Tokens of a held-out text of this file under demo.tokenizer.trained_tokenizer, within a few per cent: a word is
    one token, and a long name more. The numbers are fitted."""
    words = TOKEN.findall(text)
    return 1.007 * len(words) + 0.302 * sum(len(word) - 2 for word in words if len(word) > 2 and word[0].isupper())


def facts(draw: Draw, count: int) -> list[Fact]:
    """Facts with different questions, of which most have the same relation, about names that are alike or the same."""
    same = draw.choice(RELATIONS)
    found: dict[str, Fact] = {}
    names: list[str] = []
    while len(found) < count:
        relation = same if draw.chance(0.6) else draw.choice(RELATIONS)
        made = _fact(draw, relation, names)
        if "{name}" not in relation[1] and "{place}" not in relation[1] and held_out(made[1]) != draw.held_out:
            continue  # what is asked about is no word of this split
        found.setdefault(made[1], made)
    return list(found.values())


def _fact(draw: Draw, relation: Fact, names: list[str]) -> Fact:
    """About a new name, which is added to `names`, or one of them."""
    if not names or draw.chance(0.8):
        names.append(draw.similar(draw.choice(names)) if names and draw.chance(0.4) else draw.name())
    words = {
        "name": draw.choice(names[-3:]), "place": draw.invented(), "pet": draw.invented(), "day": draw.choice(DAYS),
        "number": str(draw.number(draw.integer(3, 5))), "colour": draw.choice(COLOURS), "thing": draw.choice(THINGS),
        "room": draw.word(ROOMS), "animal": draw.choice(ANIMALS), "food": draw.word(FOODS),
    }  # fmt: skip
    fact, ask, expected = (part.format(**words) for part in relation)
    return fact, ask, expected


def text(draw: Draw, known: list[Fact], tokens: int) -> str:
    """Stories of about `tokens` tokens in all, with the facts at uniformly drawn places between sentences."""
    left = tokens - sum(estimate(" " + fact) for fact, _, _ in known)
    sentences: list[str] = []
    while left > 0:
        for sentence in _sentences(stories.story(draw, stories.cast(draw))):
            if left <= 0:
                break
            sentences.append(sentence)
            left -= estimate(" " + sentence)
    places = sorted(draw.integer(0, len(sentences)) for _ in known)
    for shift, (place, (fact, _, _)) in enumerate(zip(places, known, strict=True)):
        sentences.insert(place + shift, fact)
    return " ".join(sentences)


def _sentences(story: str) -> list[str]:
    return _BETWEEN.split(story)


def documents(draw: Draw) -> Iterator[Document]:
    while True:
        tokens = int(256 * 16 ** draw.rng.betavariate(1.1, 2.1))  # 256 to 4096
        known = facts(draw, draw.integer(8, 12 + tokens // 200))
        thinking = draw.chance(0.2)
        messages = []
        asked = draw.sample(known, min(len(known), MOST_ASKED))
        body = draw.choice(LEADS) + text(draw, known, tokens) + "\n\n"
        for fact, ask, _ in asked:
            messages += [user(body + ask), assistant(fact, "I look for it in the text." if thinking else "")]
            body = ""
        yield chat(KIND, messages)


def tasks(draw: Draw, tokens: int) -> Iterator[Task]:
    """One question for each document of about `tokens` tokens, 1024 if that is 0."""
    while True:
        tokens = tokens or 1024
        known = facts(draw, draw.integer(3, 6 + tokens // 200))
        _, ask, expected = draw.choice(known)
        overhead = 12 + estimate(ask)  # template, lead and question
        body = text(draw, known, tokens - int(overhead))
        yield Task(KIND, [user(f"{LEADS[0]}{body}\n\n{ask}")], None, False, expected, tokens)
