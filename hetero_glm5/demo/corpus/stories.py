"""Short stories from a grammar: somebody wants something, something is in the way, somebody helps, it ends well."""

from __future__ import annotations

from collections.abc import Iterator

from hetero_glm5.demo.corpus.document import Document, Task, assistant, chat, opening, prose, user
from hetero_glm5.demo.corpus.words import ANIMALS, COLOURS, FOODS, THINGS, Draw, table, unfolded

KIND = "stories"
PLACES = table(
    "lighthouse forest village river mountain valley island meadow market castle garden bridge lake mill harbour "
    "desert library station farm cave"
)
MOODS = table("brave small clever shy old curious gentle lazy proud lonely cheerful hungry quiet kind")


def _lines(text: str) -> list[str]:
    """The alternatives of a part, one a line."""
    return unfolded(text).splitlines()


WEATHER = _lines("""
the sun was shining
it was raining
the wind was cold
snow was falling
the fog was thick
the birds were singing
""")
STARTS = _lines("""
Once upon a time there was a {mood} {hero} called {name}. {name} lived near a {place}.
Long ago, a {mood} {hero} lived by the {place}. Everybody called the {hero} {name}.
There was once a {mood} {hero} whose name was {name}. Every day {name} walked to the {place}.
In a small house beside the {place} lived {name}, a {mood} {hero}.
{name} was a {mood} {hero} who lived alone at the {place}.
Far away, behind the {place}, there lived a {mood} {hero}. Its name was {name}.
""")
GOALS = _lines("""
One morning {name} wanted to find the {colour} {thing}.
One day {name} lost the {colour} {thing} and was very sad.
{name} had heard of a {colour} {thing} that lay hidden in the {place}.
More than anything, {name} wished for a {colour} {thing}.
Somebody had taken the {colour} {thing}, and {name} wanted it back.
"I must find the {colour} {thing}," said {name} one day.
""")
DAYS = _lines("""
That day {weather}.
{weather}, but {name} went out anyway.
When {name} set out, {weather}.
""")
TROUBLES = _lines("""
At the {place} a big gate was closed, and nobody had the key.
But the path to the {place} was blocked by a fallen tree.
But the way was long, and soon {name} was tired and hungry.
But the {place} was dark, and {name} was afraid to go on.
But the water was deep, and {name} could not swim.
But nobody at the {place} had seen the {thing}.
""")
MEETINGS = _lines("""
Then a {friend} came along. "Why are you sad?" asked the {friend}. "I am looking for the {colour} {thing}," said
  {name}.
There {name} met a {friend} called {other}. "Can you help me?" asked {name}. "Of course," said {other}.
A {friend} sat under a tree. "I will help you," said the {friend}, "if you give me some {food}." So {name} shared the
  {food}.
"Do not be afraid," said a {friend}. "I am {other}, and I know this place well."
""")
DEEDS = _lines("""
Together they looked behind every stone.
The {friend} knew a secret way and went ahead.
They worked all day, and they did not give up.
The {friend} sang a song, and {name} was not afraid any more.
Step by step they came closer to the {place}.
They asked everybody they met.
First they rested and ate some {food}.
""")
FINDS = _lines("""
At last {name} saw something {colour} in the grass: it was the {thing}!
In the evening they found the {colour} {thing} at the {place}.
And there it lay, the {colour} {thing}.
"Look!" cried the {friend}. There was the {colour} {thing}.
""")
ENDINGS = _lines("""
{name} thanked the {friend}, and from that day on they were friends.
{name} and the {friend} went home happy.
"A friend is worth more than a {thing}," said {name}, and the {friend} smiled.
They ate {food} together, and {name} slept well that night.
{name} gave the {friend} some {food} and never forgot that day.
""")
ASKS = _lines("""
Tell me a story about a {hero} and a {place}.
Tell me a story about a {hero}.
Write a short story about a {hero} and a {thing}.
Please tell me a story with a {hero} and a {friend}.
I would like a story about a {hero} called {name}.
Make up a story about {name}, a {mood} {hero}.
Tell me a story about a {mood} {hero} and a {colour} {thing}.
Can you tell me a story about a {hero} at a {place}?
""")


def cast(draw: Draw) -> dict[str, str]:
    """Who and what a story is about; hero, place and thing together belong to the split."""

    def make() -> dict[str, str]:
        hero, friend = draw.sample(ANIMALS, 2)
        return {"hero": hero, "friend": friend, "place": draw.choice(PLACES), "thing": draw.choice(THINGS)}

    words = draw.until(make, lambda made: f"{made['hero']} {made['place']} {made['thing']}")
    name, other = draw.several(draw.name, 2)
    words |= {"name": name, "other": other, "mood": draw.choice(MOODS), "colour": draw.choice(COLOURS)}
    return words | {"food": draw.choice(FOODS), "weather": draw.choice(WEATHER)}


def story(draw: Draw, words: dict[str, str]) -> str:
    parts = [STARTS, GOALS, *([DAYS] if draw.chance(0.5) else ()), TROUBLES, MEETINGS]
    lines = [draw.choice(part) for part in parts]
    lines += draw.sample(DEEDS, draw.choice((1, 1, 2)))
    lines += [draw.choice(part) for part in (FINDS, ENDINGS)]
    told = (line.format(**words) for line in lines)
    return _articles(" ".join(line[0].upper() + line[1:] for line in told))


def _articles(text: str) -> str:
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    return text


def documents(draw: Draw) -> Iterator[Document]:
    while True:
        words = cast(draw)
        text = story(draw, words)
        if draw.chance(0.5):
            yield prose(KIND, text)
        else:
            ask = _articles(draw.choice(ASKS).format(**words))
            thinking = draw.chance(0.4)
            reasoning = f"The user wants a story. I call the {words['hero']} {words['name']}." if thinking else ""
            yield chat(KIND, [*opening(draw), user(ask), assistant(text, reasoning)])


def tasks(draw: Draw, tokens: int) -> Iterator[Task]:
    """None: a story has no right answer."""
    return iter(())
