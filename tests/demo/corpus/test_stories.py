from __future__ import annotations

import itertools
import re

from hetero_glm5.demo.corpus import documents
from hetero_glm5.demo.corpus.stories import cast, story
from hetero_glm5.demo.corpus.words import Draw


def test_a_story_keeps_its_hero_and_its_thing():
    draw = Draw("train", "stories")
    seen = set()
    for _ in range(300):
        words = cast(draw)
        text = story(draw, words)
        assert text.count(words["name"]) >= 2 and words["thing"] in text and words["hero"] in text
        assert "{" not in text and "  " not in text and not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
        assert text.count('"') % 2 == 0
        seen.add(text)
    assert len(seen) == 300


def test_stories_are_told_as_prose_and_on_demand():
    found = list(itertools.islice(documents("stories", "train", 0), 200))
    asked = [document for document in found if "<|user|>" in document.text]
    assert 60 < len(asked) < 140
    for document in asked:
        hero = re.search(r"<\|user\|>[^<]* an? (?:\w+ )?(\w+)", document.text)
        assert hero
