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
LETTERS = "abcdefghijklmnopqrstuvwxyz"


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
# Words of every kind, for names and texts that mean nothing and so can only be copied.
COMMON = table(
    "able account action active add again air alert all amount angle answer any apart area argument arm array art as "
    "away axis back bag bank bar base batch beam below best bit blank block board body bone border both branch bread "
    "brick buffer build bus button cable call camp cap card care case cell centre chain change channel check circle "
    "claim class clean clear client cloth cloud code column comment copy core corner cost count course cover craft "
    "cross crowd current curve cut cycle data deal deep default degree delta depth desk detail device direct disk "
    "door dot double down draft dream drive drop dry dust early earth edge effect empty end engine entry equal error "
    "event every exact extra face factor fair fall far fee field figure fill film final fine fire first flag flat "
    "floor flow focus fold foot force fork form frame free fresh front fruit full gap gate give glass goal good grain "
    "grand graph grid ground group guard guide half hand handle hard head heart height hidden hill hint hold hole "
    "home host hour image index info inner input inside iron island job join joint jump just keep kind label lake "
    "land large last layer lead leaf left length lesson level limit line link list load local lock log logic long "
    "loop loss lower main mark market match matter mean mesh method middle mind mode model month mood moon motor "
    "mouth move name near neck need nest next night node noise north note number object odd offset only option orbit "
    "order other outer output owner pack page paint pair panel paper part pass past path pause peak pen phase piece "
    "pilot pin pipe place plan plate play plot point pool port post power press prime print profile proof pull pulse "
    "pump query queue quick rail rain range rank rate ratio raw reach record region remote rest result rice right "
    "rise river road rock role roof root round route row rule run salt same sand scale scene scope score seat seed "
    "self serial set shade shape share shell ship shop short side sign signal silk site size skill skin slot smart "
    "smoke socket soft soil song sort sound source south space span speed spin split spot spring stack stage stamp "
    "stand start state steam steel stem step stock stone stop store stream street strict style subject sugar suit sum "
    "surface swing switch table tail target task team tent term test text theme then thread time title toggle token "
    "tone tool top total touch town trace track trade trail train tree trial trunk trust tube turn type unit upper "
    "use user valid value vector version view voice volume wait walk wall warm water wave weight west what when where "
    "which who wide width wild wind wing wire wood word work world yard year zone"
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
BEFORE = table("New San Port Saint North South Old Lower Upper East West Mount Fort Los El La")  # a name of two words
_REAL = tuple(word for word in (*CITIES, *NAMES, *COMMON, *ANIMALS, *THINGS, *ROOMS) if len(word) > 3)


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
        """A capitalised word from an endless space: of one to three syllables, of two real words' parts, or of any
        letters."""
        choice = self.choice

        def make() -> str:
            shape = self.rng.random()
            if shape < 0.6:
                middle = "".join(choice(VOWELS) + choice(MIDDLES) for _ in range(choice((0, 1, 1, 2))))
                return choice(STARTS) + middle + choice(VOWELS) + choice(ENDS)
            if shape < 0.95:
                one, other = choice(_REAL), choice(_REAL)
                return one[: self.integer(1, 4)].capitalize() + other[-self.integer(2, 5) :].lower()
            return "".join(choice(LETTERS) for _ in range(self.integer(3, 6))).capitalize()

        return self.until(make)

    def word(self, words: tuple[str, ...]) -> str:
        """One of a table, or an invented one, so that copying is safer than remembering the table."""
        return self.invented() if self.chance(0.35) else self.choice(words)

    def similar(self, word: str) -> str:
        """An invented word that begins as `word` does."""
        return self.until(lambda: word[: self.integer(2, 4)] + self.invented()[-self.integer(2, 5) :].lower())

    def label(self, known: str) -> str:
        """A function's or an argument's name that says nothing, or little: any words, and now and then one `known`."""

        def make() -> str:
            count = self.choice((1, 1, 2, 2, 3))
            words = [self.choice(COMMON) if self.chance(0.5) else self.invented().lower() for _ in range(count)]
            if self.chance(0.2):
                words = [words[0], *known.split("_")]
            style = self.rng.random()
            if style < 0.3:
                return words[0] + "".join(word.capitalize() for word in words[1:])
            joined = "_".join(words) + (f"_{self.integer(1, 99)}" if style > 0.9 else "")
            return joined.upper() if style < 0.34 else joined.capitalize() if style < 0.4 else joined

        return self.until(make)

    def phrase(self, most: int) -> str:
        """Up to `most` words and numbers without sense."""
        words = [self.choice(COMMON) if self.chance(0.5) else self.invented() for _ in range(self.integer(1, most))]
        if len(words) > 1 and self.chance(0.3):
            words[-1] = str(self.number(self.integer(1, 5)))
        return " ".join(words)

    def name(self) -> str:
        return self.invented() if self.chance(0.85) else self.until(lambda: self.choice(NAMES))

    def city(self) -> str:
        if self.chance(0.2):
            return self.until(lambda: self.choice(CITIES))
        if self.chance(0.2):
            return self.until(lambda: f"{self.choice(BEFORE)} {self.invented()}")
        return self.invented()

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
