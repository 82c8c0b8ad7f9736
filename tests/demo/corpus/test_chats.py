"""Answers checked by other means than the ones that made them."""

from __future__ import annotations

import itertools
import json
import re

from hetero_glm5.demo.corpus import documents, tasks
from hetero_glm5.demo.corpus.chats import NAME_ASKS, NUMBERS
from hetero_glm5.demo.corpus.document import SYSTEMS

TURN = re.compile(r"<\|user\|>(.*?)<\|assistant\|>(?:<think>.*?)?</think>(.*?)(?=<\|)")
NUMBER = re.compile(r"\d+")


def chats(count: int):
    for document in itertools.islice(documents("chats", "train", 1), count):
        rules = re.findall(r"<\|system\|>(.*?)<\|", document.text)
        yield (rules[0] if rules and rules[0] not in SYSTEMS else ""), TURN.findall(document.text)


def test_lists_and_words():
    counts = dict.fromkeys(("sort", "reverse", "count", "spell", "most", "repeat"), 0)
    for rule, turns in chats(1500):
        for ask, said in turns if not rule else ():
            words = re.findall(r"\w+", ask.rpartition(": ")[2])
            if re.search(r"Sort|in order", ask):
                assert list(map(int, NUMBER.findall(said))) == sorted(map(int, NUMBER.findall(ask)))
                counts["sort"] += 1
            elif re.search(r"Reverse|backwards", ask):
                assert re.findall(r"\w+", said) == words[::-1]
                counts["reverse"] += 1
            elif re.search(r"How many words|Count these", ask):
                assert said == f"There are {NUMBERS[len(words)]} words."
                counts["count"] += 1
            elif re.search(r"[Ss]pell", ask):
                assert said.replace("-", "").rstrip(".").lower() in ask
                counts["spell"] += 1
            elif match := re.search(r"Which is the (largest|smallest)", ask):
                best = max if match[1] == "largest" else min
                assert int(NUMBER.search(said)[0]) == best(map(int, NUMBER.findall(ask)))
                counts["most"] += 1
            elif re.search(r"[Rr]epeat|Say \"|Copy", ask):
                assert f'"{said}"' in ask
                counts["repeat"] += 1
    assert min(counts.values()) > 30, counts


def test_rules_are_obeyed():
    counts = dict.fromkeys(("upper", "end", "begin", "one", "json", "name"), 0)
    for rule, turns in chats(1500):
        quoted = re.search(r'"(\w+)"', rule)
        prompt = rule.split('"')[0]
        for ask, said in turns if rule else ():
            if re.search("upper|capital", prompt):
                kind, obeyed = "upper", said == said.upper()
            elif re.search("JSON", prompt):
                kind, obeyed = "json", list(json.loads(said)) == [quoted[1]]
            elif re.search(r"\b(End|end|Finish)\b", prompt):
                kind, obeyed = "end", said.endswith(f" {quoted[1]}")
            elif re.search("[Bb]egin|Start", prompt):
                kind, obeyed = "begin", said.startswith(f"{quoted[1]} ")
            elif re.search("one word|One word|short", prompt):
                kind, obeyed = "one", not said.endswith(".")
            else:
                name = rule.removeprefix("You are ").removesuffix(".")
                kind, obeyed = "name", ask not in NAME_ASKS or said == f"I am {name}."
            assert obeyed, (rule, said)
            counts[kind] += 1
    assert min(counts.values()) > 60, counts


def test_what_the_user_said_is_remembered():
    told = 0
    for _, turns in chats(1500):
        before = ""
        for ask, said in turns:
            if re.match(r"(What|Where|Who|How) .*\b(my|I)\b.*\?$", ask):
                assert re.search(r"[\w-]+(?=\.$)|\d+", said)[0] in before, (ask, said, before)
                told += 1
            before += ask + " "
    assert told > 300


def test_tasks_end_with_a_question_and_hold_no_answer():
    for task in tasks("chats", 200, 0):
        assert task.messages[-1]["role"] == "user" and task.expected
        assert [m["role"] for m in task.messages if m["role"] != "system"][::2] == ["user"] * (
            (len(task.messages) + 1) // 2
        )
