"""The corpus's vocabulary: closed tables, invented words without end, and which of them are held out.

A key (a word, a number, a pair of operands, a question) belongs to the split that its checksum names, so that training
text and held-out questions cannot meet, whatever the seed.
"""

from __future__ import annotations

import hashlib
import random
import re
import zlib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SPLITS = ("train", "held-out")
HELD_OUT_OF = 8  # one key in this many is held out


def table(words: str) -> tuple[str, ...]:
    return tuple(words.split())


def unfolded(text: str) -> str:
    """A table's lines, those joined that go on in an indented one."""
    return re.sub(r"\n +", " ", text.strip())


CITIES = table(
    "Paris London Berlin Tokyo Madrid Rome Vienna Lisbon Oslo Dublin Athens Cairo Delhi Lima Boston Chicago Seattle "
    "Denver Austin Miami Toronto Sydney Beijing Shanghai Seoul Moscow Prague Warsaw Zurich Geneva Munich Hamburg Milan "
    "Venice Naples Lyon Porto Bergen Havana Nairobi Lagos Mumbai Bangkok Hanoi Jakarta Manila Osaka Kyoto Riga Tallinn "
    "Vilnius Sofia Zagreb Ankara Dubai Doha Quito Bogota Santiago Montreal Houston Dallas Atlanta Phoenix Portland"
)
NAMES = table(
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mira Noah Olga Paul Rosa Sam Tina Victor Alice "
    "Bob Carol Dora Eric Fay George Helen Ivan Jane Karl Lucy Max Nina Oscar Peter Ruth Simon Tara Uma Vera Yara"
)
STARTS = table("B Br C Cl D Dr F Fl G Gr H J K Kr L M N P Pr Qu R S Sh St T Tr V W Z Th")
VOWELS = table("a e i o u ai ea oo")
MIDDLES = table("b d g k l ll m n nd r rk s st t v z lm nt rv")
ENDS = ("", *table("l n r s k m x th nd rt sh ck"))

COLOURS = table("red blue green yellow black white brown grey pink orange purple silver golden")
ANIMALS = table(
    "fox cat dog horse bear owl rabbit mouse turtle goose otter wolf deer frog hen crow goat duck swan badger"
)
THINGS = table(
    "lamp book key map rope basket drum kettle mirror ladder lantern bell box coat cup clock boat chair letter coin "
    "flute ring hammer kite ball hat spoon candle bottle wheel"
)
ROOMS = table(
    "cellar kitchen attic garden shed barn tower library hall stable workshop cupboard harbour office pantry cabin "
    "tent cave mill bakery"
)
FOODS = table("apples pears plums nuts eggs beans carrots onions cherries lemons figs olives")


def held_out(key: str) -> bool:
    return zlib.crc32(b"held-out 1 " + key.encode()) % HELD_OUT_OF == 0


class Draw:
    """Random choices for one stream of documents; the same (split, key) draws the same ones in every process."""

    def __init__(self, split: str, *key: object):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; use train or held-out.")
        digest = hashlib.sha256(" ".join(map(str, (split, *key))).encode()).digest()
        self.rng = random.Random(int.from_bytes(digest[:8], "big"))
        self.held_out = split == "held-out"
        self.choice = self.rng.choice
        self.integer = self.rng.randint  # both ends included

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def until(self, make: Callable[[], T], key: Callable[[T], str] = str) -> T:
        """What `make` draws, again until it belongs to this split."""
        while held_out(key(value := make())) != self.held_out:
            pass
        return value

    def sample(self, values: list[T] | tuple[T, ...], count: int) -> list[T]:
        return self.rng.sample(values, count)

    def text(self, alternatives: str) -> str:
        """One of `a | b | c`."""
        return self.choice(alternatives.split(" | "))

    def invented(self) -> str:
        """A capitalised word that no table holds, one to three syllables."""
        choice = self.choice

        def make() -> str:
            middle = "".join(choice(VOWELS) + choice(MIDDLES) for _ in range(choice((0, 1, 1, 2))))
            return choice(STARTS) + middle + choice(VOWELS) + choice(ENDS)

        return self.until(make)

    def name(self) -> str:
        return self.invented() if self.chance(0.6) else self.until(lambda: self.choice(NAMES))

    def city(self) -> str:
        return self.invented() if self.chance(0.5) else self.until(lambda: self.choice(CITIES))

    def number(self, digits: int) -> int:
        """A number of exactly `digits` digits; one of three digits or more belongs to the split."""
        low, high = 10 ** (digits - 1), 10**digits - 1
        if digits < 3:
            return self.integer(low, high)
        return self.until(lambda: self.integer(low, high))

    def several(self, make: Callable[[], T], count: int) -> list[T]:
        """`count` different values."""
        values: list[T] = []
        while len(values) < count:
            if (value := make()) not in values:
                values.append(value)
        return values


def listed(words: list[str]) -> str:
    """a, b and c"""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
