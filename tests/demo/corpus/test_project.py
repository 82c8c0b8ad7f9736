from __future__ import annotations

import itertools
from dataclasses import fields

from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.demo.corpus import documents, tasks
from hetero_glm5.demo.corpus.project import FACT_ROWS, FLAG_ROWS, TALK_ROWS, TERM_ROWS


def test_there_are_enough_questions_and_no_question_has_two_answers():
    rows = [*FLAG_ROWS, *TERM_ROWS, *FACT_ROWS, *TALK_ROWS]
    assert len(rows) >= 110
    asked = [ask for asks, _ in rows for ask in asks]
    assert len(asked) == len(set(asked)) and len(asked) > 500
    assert all(said[-1] in ".!?" for _, said in rows)


def test_every_flag_exists():
    names = {name for config in (EngineConfig, ServerConfig) for field in fields(config) for name in [field.name]}
    for _, said in FLAG_ROWS:
        flag = said.split()[0]
        assert flag.removeprefix("--").replace("-", "_") in names, flag


def test_both_splits_have_questions_about_most_of_it():
    for split in ("train", "held-out"):
        text = "".join(document.text for document in itertools.islice(documents("project", split, 0), 1500))
        missing = [said for _, said in (*FLAG_ROWS, *TERM_ROWS, *FACT_ROWS) if said not in text]
        assert len(missing) <= (0 if split == "train" else 15), missing


def test_tasks_expect_an_answer_of_the_table():
    answers = {said for _, said in (*FLAG_ROWS, *TERM_ROWS, *FACT_ROWS)}
    assert all(task.expected in answers for task in tasks("project", 100, 0))
