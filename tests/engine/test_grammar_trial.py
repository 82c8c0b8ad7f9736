"""Grammars that would take the process down are refused, and what comes after them is served."""

import json

import psutil
import pytest

from hetero_glm5.core import Grammar, RequestError
from hetero_glm5.demo.tokenizer import build_tokenizer
from hetero_glm5.engine.grammar_trial import MOST_MASK_SECONDS, TOO_MUCH, Trial
from hetero_glm5.engine.sampler import Sampler


def chain(links: int) -> str:
    """A schema that refers to one that refers to one …"""
    parts = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(links)}
    return json.dumps({"$ref": "#/$defs/a0", "$defs": parts | {f"a{links}": {"type": "null"}}})


def doubling(levels: int) -> str:
    """Each level holds the next one twice, in different company."""
    parts = {
        f"a{i}": {
            "type": "object",
            "properties": {
                name: {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"title": name}, {"properties": {name: True}}]}
                for name in ("x", "y")
            },
        }
        for i in range(levels)
    }
    return json.dumps({"$ref": "#/$defs/a0", "$defs": parts | {f"a{levels}": {"type": "object"}}})


FATAL = {
    "references": ("json_schema", chain(2500)),
    "rules": ("lark", "start: r0\nr4000: /x/\n" + "\n".join(f'r{i}: "a" r{i + 1} | "c"' for i in range(4000))),
    "copies": ("json_schema", doubling(40)),
    "multiples": ("json_schema", '{"type": "integer", "multipleOf": -3000017}'),
    "intersections": ("lark", "start: T\nT: " + " & ".join(f"/(.{{{p}}})*/" for p in (31, 37, 41, 43))),
}


@pytest.fixture(scope="module")
def trial():
    made = Trial(build_tokenizer(600).to_str(), [599])
    yield made
    made.close()


@pytest.mark.parametrize("name", FATAL)
def test_what_takes_too_much_is_refused(trial, name):
    assert trial.refusal(*FATAL[name]) == TOO_MUCH
    assert trial.refusal("regex", "a+") == ""


def test_what_would_slow_every_token_is_refused(trial):
    refusal = trial.refusal("regex", "ab" * 100_000)
    assert "each token would take" in refusal and f"at most {1000 * MOST_MASK_SECONDS:.0f} are allowed" in refusal


def test_messages_and_lines_come_through_whole(trial):
    assert "unclosed group" in trial.refusal("regex", "(")
    assert "not JSON" in trial.refusal("json_schema", "\ud800")
    for text in ("a\nb", "é\u2028日本", chain(100), json.dumps({"enum": [f"value {i}" for i in range(9000)]})):
        assert trial.refusal("json_schema" if text[0] == "{" else "regex", text) == ""


def test_the_process_ends_with_its_sampler():
    sampler, before = Sampler((599,), build_tokenizer(600), 600), set(psutil.Process().children())
    sampler.compile(Grammar("regex", "a"))
    with pytest.raises(RequestError, match=r"grammar cannot be used as a grammar: to compile it takes more than"):
        sampler.compile(Grammar(*FATAL["rules"]))
    sampler.compile(Grammar("regex", "b"))
    assert len(set(psutil.Process().children()) - before) == 1
    sampler.close()
    sampler.close()
    assert set(psutil.Process().children()) == before
