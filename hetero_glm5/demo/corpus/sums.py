"""Sums with whole numbers. The working goes digit by digit from the ones place and shows the result so far after each
colon, so that every step needs one table of single digits and a copy:

    27 + 45: 7+5=12, carry 1: 2; 2+4+1=7: 72.

A pair of operands is held out in either order and under every operation.
"""

from __future__ import annotations

from collections.abc import Iterator

from hetero_glm5.demo.corpus.document import Document, Message, Task, assistant, chat, opening, user
from hetero_glm5.demo.corpus.words import FOODS, THINGS, Draw

KIND = "sums"
Sum = tuple[int, str, int]
PHRASES = (
    "What is {a} {op} {b}?", "What is {a} {op} {b}?", "{a}{op}{b}=", "{a} {op} {b} =", "Compute {a} {op} {b}.",
    "How much is {a} {op} {b}?", "{a} {op} {b}", "Please calculate {a} {op} {b}.", "what's {a} {op} {b}?", "{a}{op}{b}",
    "Can you work out {a} {op} {b}?", "What does {a} {op} {b} make?",
)  # fmt: skip
SPOKEN = {
    "+": ("What is {a} plus {b}?", "Add {a} and {b}.", "What is the sum of {a} and {b}?"),
    "-": ("What is {a} minus {b}?", "Subtract {b} from {a}.", "Take {b} away from {a}."),
    "*": ("What is {a} times {b}?", "Multiply {a} by {b}.", "What is {a} x {b}?"),
}
STORIES = {  # question, answer
    "+": (
        ("{n} has {a} {t} and gets {b} more. How many {t} does {n} have now?", "{n} has {r} {t} now."),
        ("{n} picks {a} {t} on Monday and {b} on Tuesday. How many {t} is that?", "That is {r} {t}."),
        ("There are {a} {t} in one box and {b} in another. How many {t} are there?", "There are {r} {t}."),
    ),
    "-": (
        ("{n} has {a} {t} and gives away {b}. How many {t} are left?", "{r} {t} are left."),
        ("There were {a} {t}, and {n} sold {b}. How many {t} are left?", "{r} {t} are left."),
    ),
    "*": (
        ("{n} has {a} boxes with {b} {t} in each. How many {t} does {n} have?", "{n} has {r} {t}."),
        ("One bag holds {b} {t}. How many {t} do {a} bags hold?", "They hold {r} {t}."),
    ),
}
GOODS = [*FOODS, *(f"{thing}s" for thing in THINGS if thing[-1] not in "sxh")]


def result(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def working(a: int, op: str, b: int) -> str:
    """a is one digit if op is *."""
    if op == "*":
        steps = _product(a, b)
    else:
        width = max(len(str(a)), len(str(b)))
        digits = [(a // 10**i % 10, b // 10**i % 10) for i in range(width)]
        steps = _addition(digits) if op == "+" else _subtraction(digits)
    return f"{a} {op} {b}: {'; '.join(steps)}. So {result(a, op, b)}."


def _addition(digits: list[tuple[int, int]]) -> Iterator[str]:
    carry, done = 0, ""
    for place, (x, y) in enumerate(digits, 1):
        total = x + y + carry
        step = f"{x}+{y}{'+1' if carry else ''}={total}"
        carry = int(total > 9 and place < len(digits))
        done = f"{total - 10 if carry else total}{done}"
        yield f"{step}{', carry 1' if carry else ''}: {done}"


def _subtraction(digits: list[tuple[int, int]]) -> Iterator[str]:
    borrow, done = 0, ""
    for x, y in digits:
        less = "-1" if borrow else ""
        short = x < y + borrow
        rest = x + 10 * short - y - borrow
        step = f"{x}-{y}{less}, borrow, {x + 10}-{y}{less}={rest}" if short else f"{x}-{y}{less}={rest}"
        borrow, done = int(short), f"{rest}{done}"
        yield f"{step}: {done}"


def _product(a: int, b: int) -> Iterator[str]:
    carry, done = 0, ""
    digits = str(b)[::-1]
    for place, digit in enumerate(map(int, digits), 1):
        total = a * digit + carry
        step = f"{a}*{digit}={a * digit}" + (f", +{carry}={total}" if carry else "")
        last = place == len(digits)
        done = f"{total if last else total % 10}{done}"
        carry = 0 if last else total // 10
        yield f"{step}{f', carry {carry}' if carry else ''}: {done}"


def draw_sum(draw: Draw, easy: bool = False) -> Sum:
    """`easy`: an addition or subtraction of at most two digits."""

    def make() -> Sum:
        op = draw.choice("+++--" if easy else "+++++----**")
        if op == "*":
            return draw.integer(2, 9), op, draw.integer(2, 99)
        sizes = (1, 2, 2) if easy else (1, 2, 2, 2, 2, 3, 3, 3)
        a, b = (
            draw.integer(0 if size == 1 else 10 ** (size - 1), 10**size - 1) for size in draw.rng.choices(sizes, k=2)
        )
        return (max(a, b), op, min(a, b)) if op == "-" else (a, op, b)

    return draw.until(make, key)


def key(question: Sum) -> str:
    a, _, b = question
    return f"{min(a, b)} {max(a, b)}"


def question(draw: Draw, easy: bool) -> tuple[str, str, Sum]:
    """The question, the answer and the sum."""
    a, op, b = sum_ = draw_sum(draw, easy)
    r = result(a, op, b)
    if draw.chance(0.2):
        ask, say = draw.choice(STORIES[op])
        name, goods = draw.name(), draw.choice(GOODS)
        return ask.format(a=a, b=b, n=name, t=goods), say.format(r=r, n=name, t=goods), sum_
    ask = draw.choice(SPOKEN[op] if draw.chance(0.2) else PHRASES)
    return ask.format(a=a, b=b, op=op), f"{a} {op} {b} = {r}.", sum_


def turn(draw: Draw, thinking: bool) -> list[Message]:
    ask, answer, sum_ = question(draw, easy=not thinking)
    return [user(ask), assistant(answer, working(*sum_) if thinking else "")]


def documents(draw: Draw) -> Iterator[Document]:
    while True:
        thinking = draw.chance(0.8)
        turns = draw.choice((1, 1, 2, 3, 4))
        yield chat(KIND, opening(draw) + [message for _ in range(turns) for message in turn(draw, thinking)])


def tasks(draw: Draw, tokens: int) -> Iterator[Task]:
    while True:
        ask, _, sum_ = question(draw, easy=False)
        yield Task(KIND, [user(ask)], None, True, str(result(*sum_)))
