"""Tool use: a prompt that offers tools, requests that need one call, two or none, results and answers from them.

Every tool and argument is described. Names vary from document to document, and some say nothing (`Draw.label`), so the
model has to find a function by its description. The reasoning does that in steps that are each easy to learn. It goes
through the tools in the prompt's order, and for each writes the number, the name that has this number, the description
that follows the name, a few words that are always the same for such a tool, and the number again. Then it says what is
wanted, in those words, and what followed them: the number; with the number goes the name. Last come the arguments of
each call, one after the other. (What a small model learns last is to go from a description back to the name before it,
and to compare two texts.) With thinking off the same words are the answer's text before the call: without them the
model would have to choose unseen.

A document's requests go round the tools on offer, so that few can be answered as the one before was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hetero_glm5.demo.corpus import chats, project, sums
from hetero_glm5.demo.corpus.document import Document, Message, Task, assistant, chat, opening, user
from hetero_glm5.demo.corpus.tool_table import TABLE
from hetero_glm5.demo.corpus.tool_table_more import MORE
from hetero_glm5.demo.corpus.tool_values import Value, schema, value, varied
from hetero_glm5.demo.corpus.words import Draw, held_out, unfolded

T = TypeVar("T")
KIND = "tools"
OFTEN = {"get_weather": 8, "get_time": 2, "web_search": 2, "calculate": 2}  # times as often as the other tools
RENAMED = 0.12  # share of functions, and of arguments, whose names say nothing
THINKING = 0.75  # share of documents and of tasks
DIRECTORIES = 0.1  # share of documents that ask which tools there are
PLAIN = 0.15  # share of requests in a description's own words
CHAINS = (  # first tool, its field, second tool, the argument it fills, what the user says
    ("find_contact", "email", "send_email", "to", 'Look up {name} and email "{body}". | Email {name} "{body}".'),
    ("find_contact", "email", "send_email", "to", 'Find the address of {name} and write "{body}".'),
    ("list_files", "first", "read_file", "path", "Read the first file in {folder}."),
    ("list_files", "first", "delete_file", "path", "Delete the first file in {folder}."),
    ("search_news", "headline", "take_note", "text", "Find news about {topic} and note the headline."),
    ("web_search", "url", "open_page", "url", "Search for {query} and open the page."),
    ("get_user", "email", "send_email", "to", 'Email user {user} "{body}".'),
    ("get_user", "name", "call_contact", "person", "Call user {user}."),
    ("list_events", "title", "cancel_event", "title", "Cancel what I have planned on {day}."),
    ("find_places", "street", "call_taxi", "address", "Find a {kind} in {city} and call a taxi to it."),
    ("list_todos", "first", "set_reminder", "text", "Remind me of my first task at {time}."),
)  # fmt: skip
LEADS = ("Please: ", "Hey! ", "Hello. ", "Hi. ", "Quickly: ", "One more thing: ", "Next: ", "A request: ", "Now: ")
DIRECTORY_ASKS = (
    "Which functions do you have?", "List your tools.", "What can you call?", "Name all your functions.",
    "Which tools are there?", "Show me the functions you can use.", "What are your tools?",
)  # fmt: skip
ERRORS = ("not found", "no connection", "permission denied", "timeout", "unknown name")


@dataclass(frozen=True)
class Parameter:
    names: tuple[str, ...]
    kind: str
    descriptions: tuple[str, ...]
    phrase: str | None  # how the user asks for an optional one


@dataclass(frozen=True)
class Tool:
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    asks: tuple[str, ...]
    both: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]
    says: tuple[str, ...]


def parse_table(text: str) -> dict[str, Tool]:
    """Tools by their first name."""
    tools = {}
    for block in unfolded(text).split("\n\n"):
        names, *lines = block.splitlines()
        rows: dict[str, tuple[str, ...]] = {"both": ()}
        parameters = []
        for head, rest in (line.split(" ", 1) for line in lines):
            if head in "+?":
                parameters.append(_parameter(rest))
            else:
                rows[head] = tuple(rest.split(" | "))
        fields = tuple(tuple(field.split("=", 1)) for field in rows["gets"][0].split())
        tool = Tool(
            tuple(names.split()), rows["does"], tuple(parameters), rows["ask"], rows["both"], fields, rows["says"]
        )
        tools[tool.names[0]] = tool
    return tools


def _parameter(line: str) -> Parameter:
    match = re.fullmatch(r"([\w ]+) = ([^ ,]+)(?:, (.+?))? : (.+)", line)
    assert match, line
    names, kind, phrase, descriptions = match.groups()
    return Parameter(tuple(names.split()), kind, tuple(descriptions.split(" | ")), phrase)


TOOLS = parse_table(TABLE + MORE)
_WEIGHTED = [name for name in TOOLS for _ in range(OFTEN.get(name, 1))]
_TRAIN_NAMES = {  # a name that is held out is never offered in training, but for the first ones
    names: [name for i, name in enumerate(names) if i == 0 or not held_out(name)]
    for tool in TOOLS.values()
    for names in (tool.names, *(parameter.names for parameter in tool.parameters))
}


def _relatives() -> dict[str, list[str]]:
    """For each tool those that are easily taken for it: they share a word of its name."""
    words = {name: {word.rstrip("s") for word in name.split("_")} for name in TOOLS}
    return {name: [other for other in TOOLS if other != name and words[name] & words[other]] for name in TOOLS}


_RELATIVES = _relatives()


@dataclass(frozen=True)
class Offer:
    """A tool as one document shows it, with one description and its choices: `keys` are its arguments' names there, by
    their names in the table."""

    tool: Tool
    name: str
    keys: dict[str, str]
    json: dict[str, Any]
    number: int = 1  # which of the tools in the prompt
    listing: str = ""  # of the reasoning, what it says of the tools

    @property
    def purpose(self) -> str:
        """The tool in a few words, always the same."""
        return self.tool.names[0].replace("_", " ")

    @property
    def line(self) -> str:
        """The name in quotes, so that it keeps the tokens it has in the tools' JSON."""
        return f'#{self.number} "{self.name}": {self.tool.descriptions[0]}'

    @property
    def told(self) -> str:
        return f"{self.line} = {self.purpose} #{self.number}. "

    @property
    def chosen(self) -> str:
        return f'{self.listing}Wanted: {self.purpose} #{self.number} "{self.name}".'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _with(keys: list[str]) -> str:
    return ", with " + ", ".join(f'"{key}"' for key in keys) if keys else ""


def offer(draw: Draw, tool: Tool, renamed: float = RENAMED) -> Offer:
    varying = tuple(replace(p, kind=varied(draw, p.kind)) for p in tool.parameters)
    tool = replace(tool, descriptions=(draw.choice(tool.descriptions),), parameters=varying)
    name, keys = _function_name(draw, tool, renamed), _keys(draw, tool, renamed)
    properties = {}
    for parameter in tool.parameters:
        described = {"description": draw.choice(parameter.descriptions)}
        properties[keys[parameter.names[0]]] = schema(parameter.kind) | described
    required = [keys[p.names[0]] for p in tool.parameters if p.phrase is None]
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required or draw.chance(0.5):
        parameters["required"] = required
    function = {"name": name, "description": tool.descriptions[0], "parameters": parameters}
    if draw.chance(0.05):
        parameters["additionalProperties"] = False
        function["strict"] = True
    return Offer(tool, name, keys, {"type": "function", "function": function})


def _keys(draw: Draw, tool: Tool, renamed: float) -> dict[str, str]:
    while True:
        keys = {}
        for parameter in tool.parameters:
            first, names = parameter.names[0], _names(draw, parameter.names)
            known = first if draw.chance(0.2) else draw.choice(names)
            keys[first] = draw.label(known) if draw.chance(renamed) else known
        if len(set(keys.values())) == len(keys):
            return keys


def _names(draw: Draw, names: tuple[str, ...]) -> list[str]:
    return list(names) if draw.held_out else _TRAIN_NAMES[names]


def _function_name(draw: Draw, tool: Tool, renamed: float) -> str:
    name = tool.names[0] if draw.chance(0.3) else draw.choice(_names(draw, tool.names))
    if draw.chance(renamed):
        return draw.label(name)
    style = draw.integer(0, 9)
    if style < 1:
        head, *rest = name.split("_")
        return head + "".join(word.capitalize() for word in rest)
    if style < 2:
        return f"{draw.invented().lower()}_{name}"
    return name


@dataclass(frozen=True)
class Call:
    offer: Offer
    values: dict[str, Value]  # by the argument's name in the table

    @property
    def arguments(self) -> dict[str, Any]:
        return {self.offer.keys[key]: json_value for key, (json_value, _) in self.values.items()}

    @property
    def plan(self) -> str:
        """Its arguments as they will stand in the call."""
        texts = [f'"{key}" = {raw if isinstance(raw, str) else _json(raw)}' for key, raw in self.arguments.items()]
        return f" {'; '.join(texts)}." if texts else ""

    @property
    def said(self) -> dict[str, str]:
        return {key: said for key, (_, said) in self.values.items()}


Round = tuple[str, list[list[Call]]]  # what the user says, and the calls of each assistant's turn


def single(draw: Draw, offered: Offer) -> Round:
    tool = offered.tool
    values, phrases = {}, ""
    for parameter in tool.parameters:
        if parameter.phrase is None:
            values[parameter.names[0]] = value(draw, parameter.kind)
        elif draw.chance(0.5):
            values[parameter.names[0]] = drawn = value(draw, parameter.kind)
            phrases += " " + parameter.phrase.format(drawn[1])
    if tool.names[0] in ("convert_units", "convert_currency") and values["source"] == values["target"]:
        return single(draw, offered)
    call = Call(offered, values)
    ask = draw.choice(tool.asks)
    if draw.chance(PLAIN):
        ask = plain(draw, call) or ask
    end = ask[-1] if ask[-1] in ".?" else ""
    return ask.removesuffix(end).format(**call.said) + phrases + end, [[call]]


def plain(draw: Draw, call: Call) -> str:
    """The request in a description's words; empty if a value has to be said in a way of its own."""
    tool = call.offer.tool
    required = [parameter.names[0] for parameter in tool.parameters if parameter.phrase is None]
    kinds = [type(call.values[key][0]) for key in required]
    if not set(kinds) <= {str, int, float}:
        return ""
    texts = [f'"{{{key}}}"' if kind is str else f"{{{key}}}" for key, kind in zip(required, kinds, strict=True)]
    if len(texts) > 1:
        texts = [f"{key} {text}" for key, text in zip(required, texts, strict=True)]
    return draw.choice(tool.descriptions) + (": " + ", ".join(texts) if texts else "") + "."


def parallel(draw: Draw, offered: Offer) -> Round:
    first = offered.tool.parameters[0]
    pair = draw.several(lambda: value(draw, first.kind), 2)
    ask = draw.choice(offered.tool.both).format(a=pair[0][1], b=pair[1][1])
    return ask, [[Call(offered, {first.names[0]: drawn}) for drawn in pair]]


def chain(draw: Draw, link: tuple[str, str, str, str, str], offers: dict[str, Offer]) -> Round:
    """Two calls, the second with a value from the first one's result: `follow` fills it in."""
    first, _, second, filled, asks = link
    ask = draw.text(asks)
    values = [
        {p.names[0]: value(draw, p.kind) for p in offers[name].tool.parameters if p.phrase is None}
        for name in (first, second)
    ]
    said = {key: drawn[1] for drawn_of in reversed(values) for key, drawn in drawn_of.items()}
    calls = [[Call(offers[name], drawn)] for name, drawn in zip((first, second), values, strict=True)]
    return ask.format(**said), calls


def result(draw: Draw, call: Call) -> dict[str, Value]:
    fields = {}
    for name, kind in call.offer.tool.fields:
        fields[name] = value(draw, kind)
    if call.offer.tool.names[0] in ("calculate", "run_code"):
        text = next(iter(call.said.values())).removeprefix("print(").removesuffix(")")
        a, op, b = text.split()
        total = sums.result(int(a), op, int(b))
        fields = dict.fromkeys(fields, (total, str(total)))
    return fields


def answer(draw: Draw, call: Call, fields: dict[str, Value]) -> str:
    """Capitalised, as a value may come first."""
    said = call.said | {key: text if text else str(raw).lower() for key, (raw, text) in fields.items()}
    text = draw.choice(call.offer.tool.says).format(**said)
    return text[0].upper() + text[1:]


def reasoned(reasoning: str, thinking: bool, content: str = "") -> Message:
    """The steps to a call, or to not making one, are thought or said."""
    return assistant(content, reasoning) if thinking else assistant(f"{reasoning} {content}".strip())


def called(calls: list[Call], number: int, reasoning: str, thinking: bool) -> Message:
    functions = [{"name": call.offer.name, "arguments": call.arguments} for call in calls]
    items = [
        {"id": f"call_{number}_{i}", "type": "function", "function": function} for i, function in enumerate(functions)
    ]
    return reasoned(reasoning, thinking) | {"tool_calls": items}


def plan(calls: list[Call]) -> str:
    """Of one call, or of as many of one function."""
    return calls[0].offer.chosen + "".join(call.plan for call in calls)


def answered(message: Message, results: list[dict[str, Any]]) -> list[Message]:
    return [
        {"role": "tool", "tool_call_id": call["id"], "content": _json(fields)}
        for call, fields in zip(message["tool_calls"], results, strict=True)
    ]


def conversation(draw: Draw, round_: Round, link: tuple[str, ...] | None, thinking: bool) -> list[Message]:
    """One request up to its answer."""
    ask, steps = round_
    messages = [user(ask)]
    intro = ""
    for number, calls in enumerate(steps):
        messages.append(called(calls, number, intro + plan(calls), thinking))
        if draw.chance(0.05):
            error = draw.choice(ERRORS)
            messages += answered(messages[-1], [{"error": error}] * len(calls))
            said = f"Sorry, that did not work: {error}."
            return [*messages, assistant(said, "The call failed." if thinking else "")]
        results = [result(draw, call) for call in calls]
        messages += answered(messages[-1], [{key: raw for key, (raw, _) in fields.items()} for fields in results])
        intro = "I have the result. "
        if link and number == 0:
            steps[1][0].values[link[3]] = results[0][link[1]]
    said = " ".join(answer(draw, call, fields) for call, fields in zip(calls, results, strict=True))
    return [*messages, assistant(said, intro.strip() if thinking else "")]


def toolless(draw: Draw, thinking: bool) -> list[Message]:
    """What needs no tool, though tools are offered."""
    if thinking and draw.chance(0.4):
        return sums.turn(draw, thinking)
    ask, said = project.question(draw) if draw.chance(0.4) else chats.exchange(draw)[:2]
    return [user(ask), assistant(said, "I need no tool." if thinking else "")]


def pick(draw: Draw, count: int, wanted: list[str], renamed: float = RENAMED) -> list[Offer]:
    """`count` offers of different tools and names, those of `wanted` among them, in any order; half of the others are
    related to the first."""
    names = list(wanted)
    while len(names) < count:
        near = _RELATIVES[names[0]] if names and draw.chance(0.5) else ()
        if (name := draw.choice(near or _WEIGHTED)) not in names:
            names.append(name)
    offers: list[Offer] = []
    for name in names:
        while (offered := offer(draw, TOOLS[name], renamed)).name in {other.name for other in offers}:
            pass
        offers.append(offered)
    draw.rng.shuffle(offers)
    numbered = [replace(offered, number=number) for number, offered in enumerate(offers, 1)]
    listing = "".join(offered.told for offered in numbered)
    return [replace(offered, listing=listing) for offered in numbered]


def _shown(offers: list[Offer]) -> list[dict[str, Any]]:
    return [offered.json for offered in offers]


def _belongs(draw: Draw, make: Callable[[], tuple[str, T]]) -> tuple[str, T]:
    """A request of this split, by its wording, and what belongs to it."""

    def led() -> tuple[str, T]:
        ask, made = make()
        return (draw.choice(LEADS) if draw.chance(0.3) else "") + ask, made

    return draw.until(led, lambda made: made[0])


def request(draw: Draw, offers: list[Offer], offered: Offer, thinking: bool) -> list[Message]:
    """Mostly for `offered`."""
    kind = draw.rng.random()
    if kind < 0.06:
        return toolless(draw, thinking)
    if kind < 0.08:
        others = [name for name in TOOLS if all(name != offered.tool.names[0] for offered in offers)]
        missing = Offer(TOOLS[draw.choice(others)], "", {}, {})
        ask, _ = _belongs(draw, lambda: single(draw, missing))
        reasoning = f"{offers[0].listing}Wanted: {missing.purpose}. No tool does that."
        return [user(ask), reasoned(reasoning, thinking, "Sorry, I have no tool for that.")]
    if offered.tool.both and kind < 0.4:
        return conversation(draw, _belongs(draw, lambda: parallel(draw, offered)), None, thinking)
    return conversation(draw, _belongs(draw, lambda: single(draw, offered)), None, thinking)


def directory(draw: Draw, offers: list[Offer], thinking: bool) -> list[Message]:
    """The question which tools there are."""
    ask, _ = _belongs(draw, lambda: (draw.choice(DIRECTORY_ASKS), None))
    said = " ".join(f"{offered.line}{_with(list(offered.keys.values()))}." for offered in offers)
    return [user(ask), assistant(said, "I need no tool." if thinking else "")]


def documents(draw: Draw) -> Iterator[Document]:
    while True:
        thinking = draw.chance(THINKING)
        messages = opening(draw)
        if draw.chance(DIRECTORIES):
            offers = pick(draw, draw.integer(2, 6), [], renamed=0.5)
            messages += directory(draw, offers, thinking)
        elif draw.chance(0.06):
            link = draw.choice(CHAINS)
            offers = pick(draw, draw.integer(2, 4), [link[0], link[2]])
            by_name = {offered.tool.names[0]: offered for offered in offers}
            round_ = _belongs(draw, lambda link=link, offers=by_name: chain(draw, link, offers))
            messages += conversation(draw, round_, link, thinking)
        else:
            offers = pick(draw, draw.choice((1, 2, 2, 3, 3, 3, 4, 4)), [draw.choice(_WEIGHTED)])
            order = draw.sample(offers, len(offers))
            for number in range(draw.integer(len(offers), min(5, 2 * len(offers)))):
                messages += request(draw, offers, order[number % len(order)], thinking)
        yield chat(KIND, messages, _shown(offers))


def tasks(draw: Draw, tokens: int) -> Iterator[Task]:
    """Four in five want calls, one wants the answer that quotes a result."""
    while True:
        offers = pick(draw, draw.integer(1, 4), [draw.choice(_WEIGHTED)])
        twice = [offered for offered in offers if offered.tool.both]
        if twice and draw.chance(0.25):
            offered = draw.choice(twice)
            round_ = _belongs(draw, lambda offered=offered: parallel(draw, offered))
        else:
            offered = draw.choice(offers)
            round_ = _belongs(draw, lambda offered=offered: single(draw, offered))
        thinking = draw.chance(THINKING)
        ask, (calls,) = round_
        expected: Any = [{"name": call.offer.name, "arguments": call.arguments} for call in calls]
        messages = [user(ask)]
        if draw.chance(0.2):
            messages.append(called(calls, 0, plan(calls), thinking))
            results = [result(draw, call) for call in calls]
            messages += answered(messages[-1], [{key: raw for key, (raw, _) in fields.items()} for fields in results])
            expected = " ".join(answer(draw, call, fields) for call, fields in zip(calls, results, strict=True))
            for item in messages[1]["tool_calls"]:
                item["function"]["arguments"] = _json(item["function"]["arguments"])
        yield Task(KIND, messages, _shown(offers), thinking, expected)
