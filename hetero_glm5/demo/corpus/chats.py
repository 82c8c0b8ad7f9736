"""Chats of several turns: system prompts that are obeyed, what the user said before, small tasks on lists and words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from hetero_glm5.demo.corpus import project
from hetero_glm5.demo.corpus.document import Document, Message, Task, assistant, chat, opening, system, user
from hetero_glm5.demo.corpus.tool_values import sentence
from hetero_glm5.demo.corpus.words import ANIMALS, COLOURS, COMMON, FOODS, ROOMS, THINGS, Draw, table

KIND = "chats"
Exchange = tuple[str, str, str]  # what the user says, the answer, and its word that counts


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split())


CAPITALS = _pairs(
    "France=Paris Germany=Berlin Italy=Rome Spain=Madrid Portugal=Lisbon England=London Ireland=Dublin Norway=Oslo "
    "Sweden=Stockholm Finland=Helsinki Denmark=Copenhagen Poland=Warsaw Austria=Vienna Hungary=Budapest Greece=Athens "
    "Turkey=Ankara Egypt=Cairo Kenya=Nairobi Japan=Tokyo China=Beijing India=Delhi Russia=Moscow Canada=Ottawa "
    "Cuba=Havana Peru=Lima Chile=Santiago Belgium=Brussels Iceland=Reykjavik Latvia=Riga Thailand=Bangkok"
)
COLOUR_OF = _pairs(
    "grass=green snow=white blood=red coal=black honey=golden milk=white cherries=red lemons=yellow frogs=green "
    "crows=black foxes=red swans=white gold=yellow leaves=green plums=purple carrots=orange mice=grey salt=white"
)
UNCOUNTED = table("grass snow blood coal honey milk gold salt")
LEGS = _pairs(
    "dog=four cat=four horse=four hen=two crow=two spider=eight ant=six bee=six snake=zero frog=four swan=two "
    "beetle=six goat=four owl=two fox=four fly=six duck=two cow=four worm=zero sheep=four"
)
SOUNDS = _pairs("dog=barks cat=meows cow=moos duck=quacks owl=hoots frog=croaks crow=caws")
OPPOSITES = _pairs(
    "hot=cold big=small old=new fast=slow light=dark open=closed early=late full=empty hard=soft high=low long=short "
    "loud=quiet rich=poor strong=weak wet=dry young=old clean=dirty heavy=light happy=sad near=far"
)
MEMORIES = [  # the user tells | the answer | asks later | the answer | the value's kind
    line.split(" | ")
    for line in """
My name is {}. | Nice to meet you, {}. | What is my name? | Your name is {}. | name
I am {}. | Hello, {}. | Who am I? | You are {}. | name
My dog is called {}. | {} is a good name for a dog. | What is my dog called? | Your dog is called {}. | name
I live in {}. | I will remember that you live in {}. | Where do I live? | You live in {}. | city
My favourite colour is {}. | {} is a fine colour. | What is my favourite colour? | Your favourite colour is {}. | colour
My lucky number is {}. | I will remember {}. | What is my lucky number? | Your lucky number is {}. | number
I am {} years old. | So you are {}. | How old am I? | You are {} years old. | age
I like {}. | Many people like {}. | What do I like? | You like {}. | food
My key is in the {}. | Your key is in the {}. | Where is my key? | Your key is in the {}. | room
""".strip().splitlines()
]
VALUES: dict[str, Callable[[Draw], str]] = {
    "name": lambda draw: draw.name(),
    "city": lambda draw: draw.city(),
    "colour": lambda draw: draw.word(COLOURS),
    "number": lambda draw: str(draw.number(draw.integer(2, 4))),
    "age": lambda draw: str(draw.integer(5, 95)),
    "food": lambda draw: draw.word(FOODS),
    "room": lambda draw: draw.word(ROOMS),
}
NAME_ASKS = ("Who are you?", "What is your name?", "What are you called?")
NUMBERS = table("zero one two three four five six seven eight nine ten")
KEYS = table("answer reply result text output value")
LAST = table("over please indeed friend sir amen okay captain")


def _fact(draw: Draw) -> Exchange:
    kind = draw.integer(0, 4)
    subject, word = draw.choice(list((CAPITALS, COLOUR_OF, LEGS, SOUNDS, OPPOSITES)[kind].items()))
    if kind == 0:
        ask = draw.text("What is the capital of {}? | Name the capital of {}. | Which city is the capital of {}?")
        return ask.format(subject), f"The capital of {subject} is {word}.", word
    if kind == 1:
        verb = "is" if subject in UNCOUNTED else "are"
        return f"What colour {verb} {subject}?", f"{_capital(subject)} {verb} {word}.", word
    if kind == 4:
        return f"What is the opposite of {subject}?", f"The opposite of {subject} is {word}.", word
    animal = f"an {subject}" if subject[0] in "aeiou" else f"a {subject}"
    if kind == 2:
        return f"How many legs does {animal} have?", f"{_capital(animal)} has {word} legs.", word
    return f"What does {animal} do?", f"{_capital(animal)} {word}.", word


def _words(draw: Draw, count: int) -> list[str]:
    if draw.chance(0.3):
        return draw.several(draw.invented, count)
    return draw.sample(draw.choice((THINGS, ANIMALS, COLOURS, FOODS, ROOMS, COMMON, COMMON)), count)


def _numbers(draw: Draw, count: int) -> list[int]:
    most = draw.choice((9, 99, 99, 999))
    return draw.several(lambda: draw.integer(1, most), count)


def _sort(draw: Draw) -> Exchange:
    values = _numbers(draw, draw.integer(2, 4))
    said = ", ".join(map(str, sorted(values)))
    ask = draw.choice(("Sort these numbers: {}.", "Put {} in order.", "Sort {} from small to large."))
    return ask.format(", ".join(map(str, values))), f"{said}.", said


def _largest(draw: Draw) -> Exchange:
    values = _numbers(draw, draw.integer(2, 4))
    word, best = draw.choice((("largest", max(values)), ("smallest", min(values))))
    return f"Which is the {word}: {', '.join(map(str, values))}?", f"The {word} is {best}.", str(best)


def _reverse(draw: Draw) -> Exchange:
    words = _words(draw, 3)
    said = ", ".join(reversed(words))
    ask = draw.choice(("Reverse the order: {}.", "Say these words backwards: {}.", "Reverse this list: {}."))
    return ask.format(", ".join(words)), f"{said}.", said


def _count(draw: Draw) -> Exchange:
    words = _words(draw, draw.integer(2, 6))
    ask = draw.choice(("How many words are in this list: {}?", "Count these words: {}."))
    return ask.format(", ".join(words)), f"There are {NUMBERS[len(words)]} words.", NUMBERS[len(words)]


def _first(draw: Draw) -> Exchange:
    words = _words(draw, draw.integer(3, 5))
    place, at = draw.choice((("first", 0), ("second", 1), ("third", 2), ("last", -1)))
    return f"What is the {place} word of this list: {', '.join(words)}?", f"The {place} word is {words[at]}.", words[at]


def _repeat(draw: Draw) -> Exchange:
    said = sentence(draw)
    ask = draw.choice(('Repeat after me: "{}"', 'Say "{}".', 'Please repeat "{}".', 'Copy this: "{}"'))
    return ask.format(said), said, said


def _spell(draw: Draw) -> Exchange:
    word = draw.choice((*ANIMALS, *THINGS))
    said = "-".join(word.upper())
    return draw.choice(("Spell {}.", "How do you spell {}?", "Spell the word {}.")).format(word), f"{said}.", said


SMALL = (_fact, _fact, _fact, _sort, _sort, _largest, _reverse, _count, _first, _repeat, _repeat, _spell)
LEADS = ("", "", "", "", "Please tell me: ", "Next: ", "And now: ", "A question: ", "One more: ", "Then: ", "Quickly: ")


def exchange(draw: Draw) -> Exchange:
    """One small task, worded as only this split words it."""

    def make() -> Exchange:
        ask, said, word = draw.choice(SMALL)(draw)
        return draw.choice(LEADS) + ask, said, word

    return draw.until(make, lambda made: made[0])


Rule = tuple[str, Callable[[Exchange], str]]


def rule(draw: Draw) -> Rule:
    """A system prompt, and the answer that obeys it."""
    kind = draw.integer(0, 5)
    if kind == 0:
        return draw.text(
            "Answer in upper case. | Write everything in capital letters. | Use capitals only."
        ), lambda made: made[1].upper()
    if kind == 1:
        word = draw.choice(LAST) if draw.chance(0.3) else draw.invented()
        ask = draw.text('End every answer with the word "{}". | Always end with "{}". | Finish each reply with "{}".')
        return ask.format(word), lambda made: f"{made[1]} {word}"
    if kind == 2:
        word = draw.invented()
        ask = draw.text('Begin every answer with "{}". | Start each reply with "{}". | Always begin with "{}".')
        return ask.format(word), lambda made: f"{word} {made[1]}"
    if kind == 3:
        ask = draw.text("Answer in one word. | Use one word only. | Give short answers without a sentence.")
        return ask, lambda made: made[2]
    if kind == 4:
        key = draw.choice(KEYS) if draw.chance(0.4) else draw.invented().lower()
        ask = draw.text('Reply as JSON with the key "{}". | Answer with a JSON object that has the key "{}".')
        return ask.format(key), lambda made: json.dumps({key: made[2]}, ensure_ascii=False)
    name = draw.name()
    return f"You are {name}.", lambda made: made[1]


def ruled(draw: Draw) -> list[tuple[str, str]]:
    """The system prompt, then exchanges under it."""
    prompt, obey = rule(draw)
    turns = []
    for _ in range(draw.integer(2, 5)):
        if prompt.startswith("You are ") and draw.chance(0.5):
            name = prompt.removeprefix("You are ").removesuffix(".")
            ask = draw.choice(NAME_ASKS)
            turns.append((ask, f"I am {name}."))
        else:
            made = exchange(draw)
            turns.append((made[0], obey(made)))
    return [("", prompt), *turns]


def remembered(draw: Draw) -> list[tuple[str, str]]:
    """The user tells something, and asks for it later."""
    turns, later, kinds = [], [], []
    for _ in range(draw.integer(1, 3)):
        say, reply, ask, answer, kind, value = draw.until(lambda: _memory(draw), lambda made: made[0].format(made[5]))
        if kind not in kinds:
            kinds.append(kind)
            turns.append((say.format(value), _capital(reply.format(value))))
            later.append((ask, answer.format(value)))
    draw.rng.shuffle(later)
    between = [exchange(draw)[:2] if draw.chance(0.7) else project.small_talk(draw) for _ in range(draw.integer(0, 2))]
    return [*turns, *between, *later]


def _memory(draw: Draw) -> tuple[str, ...]:
    memory = draw.choice(MEMORIES)
    return *memory, VALUES[memory[4]](draw)


def mixed(draw: Draw) -> list[tuple[str, str]]:
    turns = [exchange(draw)[:2] for _ in range(draw.integer(1, 6))]
    return [project.small_talk(draw), *turns] if draw.chance(0.3) else turns


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def documents(draw: Draw) -> Iterator[Document]:
    while True:
        thinking, keep = draw.chance(0.4), draw.chance(0.6)
        turns = draw.choice((ruled, remembered, mixed))(draw)
        messages: list[Message] = opening(draw) if turns[0][0] else []
        last = len(turns) - 1
        for i, (ask, said) in enumerate(turns):
            if not ask:
                messages.append(system(said))
                continue
            think = thinking and (keep or i == last)
            reasoning = project.SMALL_TALK.get(ask, "I can answer this.") if think else ""
            messages += [user(ask), assistant(said, reasoning)]
        yield chat(KIND, messages)


def tasks(draw: Draw, tokens: int) -> Iterator[Task]:
    """The last answer of a chat counts, its words as they stand but for the full stop."""
    while True:
        turns = draw.choice((ruled, remembered, mixed))(draw)
        messages = [message for ask, said in turns[:-1] for message in _turn(ask, said)]
        ask, said = turns[-1]
        yield Task(KIND, [*messages, user(ask)], None, draw.chance(0.4), said.rstrip("."))


def _turn(ask: str, said: str) -> list[Message]:
    return [user(ask), assistant(said)] if ask else [system(said)]
