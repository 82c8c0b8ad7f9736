"""The working recomputed: every equation holds, and what is done so far is the end of the result."""

from __future__ import annotations

import itertools
import re

import pytest

from hetero_glm5.demo.corpus import documents, tasks
from hetero_glm5.demo.corpus.sums import draw_sum, result, working
from hetero_glm5.demo.corpus.words import Draw

WORKED = re.compile(r"<think>(\d+) ([-+*]) (\d+): (.*?)\. So (\d+)\.</think>(.*?)<\|")


def check(a: int, op: str, b: int, steps: str) -> None:
    want = result(a, op, b)
    done = ""
    for place, step in enumerate(steps.split("; "), 1):
        equations, _, done = step.rpartition(": ")
        total = None
        for part in equations.split(", "):
            if "=" in part:
                left, right = part.split("=")
                left = f"{total}{left}" if left[0] == "+" else left
                assert re.fullmatch(r"[0-9+*-]+", left)
                assert eval(left) == int(right), step
                total = int(right)
            else:
                assert re.fullmatch(r"carry \d|\d-\d(-1)?|borrow", part), step
        last = place == steps.count("; ") + 1
        assert int(done) == (want if last else want % 10**place), step
        assert last or len(done) == place
    assert int(done) == want


@pytest.mark.parametrize(
    ("sum_", "text"),
    [
        ((27, "+", 45), "27 + 45: 7+5=12, carry 1: 2; 2+4+1=7: 72. So 72."),
        ((5, "+", 123), "5 + 123: 5+3=8: 8; 0+2=2: 28; 0+1=1: 128. So 128."),
        ((99, "+", 1), "99 + 1: 9+1=10, carry 1: 0; 9+0+1=10: 100. So 100."),
        ((83, "-", 47), "83 - 47: 3-7, borrow, 13-7=6: 6; 8-4-1=3: 36. So 36."),
        ((100, "-", 99), "100 - 99: 0-9, borrow, 10-9=1: 1; 0-9-1, borrow, 10-9-1=0: 01; 1-0-1=0: 001. So 1."),
        ((7, "*", 46), "7 * 46: 7*6=42, carry 4: 2; 7*4=28, +4=32: 322. So 322."),
    ],
)
def test_workings(sum_, text):
    assert working(*sum_) == text


def test_every_small_sum_is_worked_out_right():
    for a, b in itertools.product(range(0, 260, 7), range(0, 1000, 13)):
        check(a, "+", b, working(a, "+", b).split(": ", 1)[1].split(". So")[0])
        high, low = max(a, b), min(a, b)
        check(high, "-", low, working(high, "-", low).split(": ", 1)[1].split(". So")[0])
    for a, b in itertools.product(range(2, 10), range(2, 100)):
        check(a, "*", b, working(a, "*", b).split(": ", 1)[1].split(". So")[0])


def test_documents_work_and_answer_right():
    seen = dict.fromkeys("+-*", 0)
    for document in itertools.islice(documents("sums", "train", 1), 1500):
        for a, op, b, steps, total, answer in WORKED.findall(document.text):
            check(int(a), op, int(b), steps)
            assert int(total) == result(int(a), op, int(b)) and total in re.findall(r"\d+", answer)
            seen[op] += 1
        for a, op, b, r in re.findall(r"</think>(\d+) ([-+*]) (\d+) = (\d+)\.<", document.text):
            assert result(int(a), op, int(b)) == int(r)
            seen[op] += 1
    assert min(seen.values()) > 300


def test_without_thinking_sums_are_easy():
    direct = re.compile(r"<\|assistant\|></think>(\d+) ([-+*]) (\d+) =")
    found = [m for d in itertools.islice(documents("sums", "train", 2), 1500) for m in direct.findall(d.text)]
    assert len(found) > 100
    assert all(op in "+-" and max(int(a), int(b)) < 100 for a, op, b in found)


def test_tasks_expect_the_result():
    asked = {"What is": 0, "": 0}
    for task in tasks("sums", 300, 0):
        question = task.messages[0]["content"]
        if match := re.fullmatch(r"What is (\d+) ([-+*]) (\d+)\?", question):
            assert task.expected == str(result(int(match[1]), match[2], int(match[3])))
            asked["What is"] += 1
        assert task.thinking and task.tools is None and str(task.expected).isdigit()
    assert asked["What is"] > 20


def test_subtractions_are_not_negative():
    draw = Draw("train", 1)
    assert all(result(*draw_sum(draw)) >= 0 for _ in range(3000))
