"""Rendering against the server's, and what of a document a model writes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from hetero_glm5.demo.chat_template import CHAT_TEMPLATE
from hetero_glm5.demo.corpus import KINDS, documents, render, tasks
from hetero_glm5.demo.corpus.document import assistant, chat, prose, system, user
from hetero_glm5.server.chat_template import ChatTemplate

SERVER = ChatTemplate({"default": CHAT_TEMPLATE}, {}, "test")
DATA = Path(__file__).parents[2] / "server" / "data" / "chat_template.json"
VECTORS = json.loads(DATA.read_text(encoding="utf-8"))["cases"]
KEPT = [case for case in VECTORS if case["name"] != "multi-turn drops old reasoning"]  # the server keeps it


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case["name"])
def test_vectors(case):
    thinking = case["kwargs"].get("enable_thinking", True)
    assert render(case["messages"], case["tools"], thinking=thinking) == case["prompt"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stories"])
def test_tasks_render_as_the_server_renders_them(kind):
    for task in tasks(kind, 60, seed=1):
        prompt = SERVER.render(task.messages, task.tools, {"enable_thinking": task.thinking})
        assert render(task.messages, task.tools, thinking=task.thinking) == prompt


def test_arguments_may_be_json_text():
    function = {"name": "f", "arguments": {"a": "Ä", "n": [1]}}
    as_text = {"name": "f", "arguments": '{"a": "Ä", "n": [1]}'}
    prompts = [render([user("Hi"), assistant("") | {"tool_calls": [{"function": f}]}]) for f in (function, as_text)]
    assert prompts[0] == prompts[1] and "<arg_value>Ä</arg_value>" in prompts[0]


def test_pieces_of_a_chat():
    turns = [system("S"), user("1"), assistant("a", "r"), user("2"), assistant("b")]
    assert chat("chats", turns).pieces == (
        ("[gMASK]<sop><|system|>S<|user|>1<|assistant|><think>", False),
        ("r</think>a<|user|>", True),
        ("2<|assistant|></think>", False),
        ("b<|endoftext|>", True),
    )


def test_pieces_around_a_call():
    function = {"name": "f", "arguments": {"a": 1}}
    called = assistant("", "r") | {"tool_calls": [{"function": function}]}
    document = chat("tools", [user("1"), called, {"role": "tool", "content": "5"}, assistant("b", "q")])
    call = "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    assert [text for text, written in document.pieces if written] == [
        f"r</think>{call}<|observation|>",
        "q</think>b<|endoftext|>",
    ]
    assert document.pieces[2][0] == "<tool_response>5</tool_response><|assistant|><think>"


def test_prose_is_written_whole():
    assert prose("stories", "A b.").pieces == (("[gMASK]<sop>", False), ("A b.<|endoftext|>", True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_piece_begins_and_ends_at_a_turn(kind):
    for document in itertools.islice(documents(kind, "train", 3), 200):
        assert document.text.startswith("[gMASK]<sop>") and document.text.endswith("<|endoftext|>")
        assert document.text.count("<|endoftext|>") == 1
        assert any(written for _, written in document.pieces)
        for text, written in document.pieces:
            ends = ("<|user|>", "<|observation|>", "<|endoftext|>") if written else ("<think>", "</think>", "<sop>")
            assert text.endswith(ends)
            assert not (written and "<|assistant|>" in text)
