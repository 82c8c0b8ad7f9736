"""Values for the kinds that the table of tools names: what stands in JSON, and how a user says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hetero_glm5.demo.corpus.sums import draw_sum
from hetero_glm5.demo.corpus.words import ANIMALS, COLOURS, FOODS, ROOMS, THINGS, Draw, listed, table

Value = tuple[Any, str]  # in JSON, as the user says it

LANGUAGES = table("French German Spanish Italian Dutch Polish Greek Turkish Arabic Hindi Chinese Japanese Korean Latin")
DAYS = table("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
UNITS = table("metres miles kilometres feet inches yards kilograms pounds grams ounces litres gallons hours minutes")
CURRENCIES = table("euros dollars pounds yen francs crowns rupees pesos")
SKIES = table("sunny cloudy rainy windy foggy snowy stormy clear")
VENUES = table("bakery cafe cinema hotel library museum park pharmacy restaurant school station theatre")
KINDS_OF = table("new old cheap famous small large modern ancient local rare simple fast green wild quiet")
SUBJECTS = table(
    "music books maps trains bridges gardens birds films games boats clocks cameras kitchens castles mountains lakes "
    "robots engines stars shoes"
)
ACTIONS = table(
    "buy call clean close collect cook feed find fix fold move open pack paint send sort sweep visit wash water"
)
SERVICES = table("mail web cache proxy queue search backup login billing metrics")
EXTENSIONS = table("txt csv md json py log pdf png")
STEMS = table("report notes data list plan draft letter table budget index readme summary")
FIELDS = table("age price size year count weight height rank level score")
COMMANDS = ("ls -l {}", "cat {}", "rm {}", "wc -l {}", "head {}", "touch {}", "python {}", "tail -f {}")
SENTENCES = (
    "see you at {time} in {city}", "the {thing} is in the {room}", "please bring {number} {foods}",
    "{person} will come on {day}", "I am late, start without me", "the code is {number}", "thank you for the {thing}",
    "we meet at the {venue} on {day}", "call {person} before {time}", "the {colour} {thing} is broken",
    "dinner is at {time}", "happy birthday", "I found the {thing} of {person}", "good morning, {person}",
    "the train to {city} leaves at {time}", "do not forget the {thing}", "my new number is {number}",
    "{person} and {person} say hello", "where is the {animal}", "the {animal} sleeps in the {room}",
)  # fmt: skip


def sentence(draw: Draw) -> str:
    if draw.chance(0.3):
        return draw.phrase(6)
    template = draw.choice(SENTENCES)
    while "{" in template:
        before, _, rest = template.partition("{")
        kind, _, after = rest.partition("}")
        template = before + spoken(draw, kind) + after
    return template


def title(draw: Draw) -> str:
    shape = draw.integer(0, 4)
    if shape == 4:
        return draw.phrase(4)
    if shape == 0:
        return draw.invented()
    if shape == 1:
        return f"{draw.invented()} {draw.invented()}"
    if shape == 2:
        return f"{draw.choice(KINDS_OF).capitalize()} {draw.invented()}"
    return f"The {draw.choice(COLOURS).capitalize()} {draw.choice(THINGS).capitalize()} of {draw.invented()}"


def person(draw: Draw) -> str:
    return draw.until(lambda: f"{draw.name()} {draw.invented()}") if draw.chance(0.2) else draw.name()


def file(draw: Draw) -> str:
    stem = draw.label("file") if draw.chance(0.6) else draw.choice(STEMS)
    number = f"_{draw.integer(1, 999)}" if draw.chance(0.6) else ""
    return f"{stem}{number}.{draw.choice(EXTENSIONS)}"


def domain(draw: Draw) -> str:
    return f"{draw.invented().lower()}.{draw.choice(('com', 'org', 'net'))}"


def identifier(draw: Draw) -> str:
    letters = "".join(draw.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(draw.integer(1, 3)))
    return f"{letters}{draw.number(draw.integer(3, 6))}"


def expression(draw: Draw) -> str:
    return "{} {} {}".format(*draw_sum(draw))


def sql(draw: Draw) -> str:
    what = draw.choice(("*", "name", "count(*)", *FIELDS))
    return f"select {what} from {draw.choice(SUBJECTS)} where {draw.choice(FIELDS)} > {draw.number(draw.integer(1, 4))}"


TEXTS: dict[str, Callable[[Draw], str]] = {
    "city": lambda draw: draw.city(),
    "person": person,
    "title": title,
    "sentence": sentence,
    "file": file,
    "id": identifier,
    "expression": expression,
    "code": lambda draw: f"print({expression(draw)})",
    "sql": sql,
    "sky": lambda draw: draw.choice(SKIES),
    "day": lambda draw: draw.choice(DAYS),
    "time": lambda draw: f"{draw.integer(0, 23):02}:{draw.integer(0, 59):02}",
    "date": lambda draw: f"20{draw.integer(24, 39)}-{draw.integer(1, 12):02}-{draw.integer(1, 28):02}",
    "topic": lambda draw: f"{draw.choice(KINDS_OF)} {draw.choice(SUBJECTS)} in {draw.city()}",
    "url": lambda draw: f"https://{domain(draw)}/{draw.choice(SUBJECTS)}",
    "email": lambda draw: f"{draw.name().lower()}@{domain(draw)}",
    "phone": lambda draw: str(draw.number(7)),
    "number": lambda draw: str(draw.number(draw.integer(1, 4))),
    "folder": lambda draw: f"/{draw.choice(ROOMS)}/{draw.invented()}",
    "command": lambda draw: draw.choice(COMMANDS).format(file(draw)),
    "unit": lambda draw: draw.choice(UNITS),
    "currency": lambda draw: draw.choice(CURRENCIES),
    "ticker": lambda draw: "".join(draw.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(draw.integer(3, 4))),
    "language": lambda draw: draw.choice(LANGUAGES),
    "errand": lambda draw: f"{draw.choice(ACTIONS)} the {draw.choice(COLOURS)} {draw.choice(THINGS)} for {draw.name()}",
    "colour": lambda draw: draw.choice(COLOURS),
    "animal": lambda draw: draw.choice(ANIMALS),
    "thing": lambda draw: draw.choice(THINGS),
    "room": lambda draw: draw.choice(ROOMS),
    "venue": lambda draw: draw.choice(VENUES),
    "street": lambda draw: f"{draw.invented()} Street {draw.integer(1, 199)}",
    "flight": lambda draw: f"{draw.choice('ABDEFKLSTU')}{draw.choice('ABFHKLRSXY')}{draw.number(draw.integer(3, 4))}",
    "goods": lambda draw: f"{draw.choice(COLOURS)} {draw.choice(SUBJECTS)}",
    "scene": lambda draw: f"a {draw.choice(COLOURS)} {draw.choice(ANIMALS)}, a {draw.choice(THINGS)} in {draw.city()}",
    "service": lambda draw: f"{draw.choice(SERVICES)}-{draw.integer(1, 99)}",
}  # fmt: skip


# Kinds that hold words from small tables: one value in three is any other phrase, so that no table is learned instead;
# it is capitalised, as a name is.
# Currencies stay, as they tell money from other units.
SMALL = frozenset(table("unit language venue goods topic room colour scene service errand"))


def value(draw: Draw, kind: str) -> Value:
    if kind in TEXTS:
        text = _named(draw.phrase(3)) if kind in SMALL and draw.chance(0.33) else TEXTS[kind](draw)
        return text, text
    if kind in ("titles", "foods", "rooms"):
        one = {"titles": title, "foods": _food, "rooms": TEXTS["room"]}[kind]
        items = draw.several(lambda: one(draw), draw.integer(1, 4))
        said = {"titles": '"{}"', "foods": "{}", "rooms": "the {}"}[kind]
        return items, listed([said.format(item) for item in items])
    if kind == "contact":
        name, phone = draw.name(), TEXTS["phone"](draw)
        return {"name": name, "phone": phone}, f"{name}, phone {phone}"
    if kind == "filter":
        field, number = draw.choice(FIELDS), draw.number(draw.integer(1, 4))
        return {field: number}, f"{field} {number}"
    if "/" in kind:
        text = draw.choice(kind.split("/"))
        return text, text
    return _scalar(draw, *kind.split(":"))


def _named(text: str) -> str:
    return text[0].upper() + text[1:]


def _food(draw: Draw) -> str:
    return draw.word(FOODS)


def _scalar(draw: Draw, kind: str, low: str = "", high: str = "") -> Value:
    """int:low:high, num:low:high, true, bool, or bool:how true is said:how false is said."""
    if kind == "int":
        number = draw.integer(int(low), int(high))
        return number, str(number)
    if kind == "num":
        tenths = draw.integer(10 * int(low), 10 * int(high))
        if tenths % 10 == 0:
            return tenths // 10, str(tenths // 10)
        return tenths / 10, str(tenths / 10)
    truth = kind == "true" or not high or draw.chance(0.5)
    return truth, low if truth else high


def spoken(draw: Draw, kind: str) -> str:
    return value(draw, kind)[1]


def varied(draw: Draw, kind: str) -> str:
    """The kind as one document has it: a choice in any order, now and then of other words."""
    if "/" not in kind:
        return kind
    options = kind.split("/")
    if draw.chance(0.35):
        options = draw.several(draw.invented, len(options))
    return "/".join(draw.sample(options, len(options)))


def schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a kind."""
    head = kind.split(":")[0]
    if head in ("titles", "foods", "rooms"):
        return {"type": "array", "items": {"type": "string"}}
    if head in ("contact", "filter"):
        return {"type": "object"}
    if "/" in head:
        return {"type": "string", "enum": head.split("/")}
    return {"type": {"int": "integer", "num": "number", "true": "boolean", "bool": "boolean"}.get(head, "string")}
