import io
import json
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

from hetero_glm5.cli import app
from hetero_glm5.cli.chat import Talk
from hetero_glm5.core import UserError


class Model:
    """In place of a Client: answers with `says`, one list of deltas for each request; an exception is raised."""

    def __init__(self, *says):
        self.says, self.bodies, self.closed = list(says), [], 0

    def chunks(self, body):
        self.bodies.append(json.loads(json.dumps(body)))
        try:
            for said in self.says.pop(0):
                if isinstance(said, BaseException):
                    raise said
                yield {"choices": [{"delta": said}]}
            yield {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
        finally:
            self.closed += 1


def talking(model, *lines, **settings):
    """A Talk after these lines (an exception is raised instead), and what it printed."""
    out = io.StringIO()
    talk = Talk(model, {"model": "m", **settings}, console=Console(file=out, force_terminal=True, width=300))
    left, prompts = list(lines), []

    def ask(prompt):
        prompts.append(prompt)
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    talk.run(ask)
    talk.prompts = prompts
    return talk, out.getvalue()


HELLO = [{"role": "assistant"}, {"reasoning_content": "[hm]"}, {"content": "Hello"}, {"content": " you"}]
CALL = [{"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"a": 1}'}}]}]


def roles(body):
    return [message["role"] for message in body["messages"]]


def test_turns_grow_and_thinking_is_dim():
    model = Model(HELLO, [{"content": "Bye"}])
    talk, shown = talking(model, "hi", "", "  more  ")
    assert "\x1b[2m[hm]\x1b[0m" in shown and "\x1b[2mHello" not in shown and "Hello" in shown
    assert [roles(body) for body in model.bodies] == [["user"], ["user", "assistant", "user"]]
    assert model.bodies[1]["messages"][1] == {
        "role": "assistant", "content": "Hello you", "reasoning_content": "[hm]"
    }  # fmt: skip
    assert model.bodies[1]["messages"][2]["content"] == "more" and len(talk.messages) == 4
    assert len(re.findall(r"5 tokens of prompt, 0 known; 2 tokens, the first after [\d.]+ s", shown)) == 2


def test_commands():
    model = Model(*([{"content": "x"}] for _ in range(3)))
    lines = ["/system You add.", "a", "/think off", "/clear", "b", "/think on", "c", "/thinking", "/quit", "d"]
    talk, shown = talking(model, *lines)
    assert [roles(body) for body in model.bodies] == [
        ["system", "user"], ["system", "user"], ["system", "user", "assistant", "user"]
    ]  # fmt: skip
    kwargs = [body.get("chat_template_kwargs") for body in model.bodies]
    assert kwargs == [None, {"enable_thinking": False}, {"enable_thinking": True}]
    assert "'/thinking' is no command" in shown.replace("\x1b[33m", "") and len(talk.prompts) == 9


def test_a_call_waits_for_its_result():
    model = Model(CALL, [{"content": "3"}])
    talk, shown = talking(model, "1 + 2?", "three", tools=[{"type": "function"}])
    assert "\x1b[36madd" in shown and talk.prompts[1] == "result of add> "
    assert roles(model.bodies[1]) == ["user", "assistant", "tool"]
    assert model.bodies[1]["messages"][2] == {"role": "tool", "tool_call_id": "c1", "content": "three"}
    assert model.bodies[1]["tools"] == [{"type": "function"}]


def test_ctrl_c_cancels_an_answer_and_then_ends():
    model = Model([{"content": "He"}, KeyboardInterrupt()], [{"reasoning_content": "hm"}, KeyboardInterrupt()], HELLO)
    talk, shown = talking(model, "a", "b", "c", KeyboardInterrupt(), "d")
    assert shown.count("(cancelled)") == 2 and model.closed == 3
    assert [message["content"] for message in model.bodies[2]["messages"]] == ["a", "He", "c"]
    assert len(talk.prompts) == 4


def test_a_refused_turn_is_forgotten():
    model = Model([UserError("too long.")], HELLO)
    talk, shown = talking(model, "a", "b")
    assert "error: too long." in shown and roles(model.bodies[1]) == ["user"]


def test_one_prompt_from_a_pipe():
    result = CliRunner().invoke(app, ["chat", "--model", "demo", "--max-tokens", "60"], input="What is 27 + 45?\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\n") and "tokens of prompt" not in result.stdout
    assert re.search(r"\d+ tokens of prompt, \d+ known; \d+ tokens", result.stderr)
    assert "</think>" not in result.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--url", "http://127.0.0.1:9"], "does not answer"),
        (["--tools", "nowhere.json"], "nowhere.json"),
        (["--model", "nowhere"], "nowhere is not a checkpoint"),
    ],
)
def test_refusals(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["chat", *flags], input="hi")
    assert result.exit_code == 1 and "error: " in result.output and words in " ".join(result.output.split())


def test_help_is_grouped():
    shown = CliRunner().invoke(app, ["--help"]).output
    places = [shown.index(f"─ {panel} ") for panel in ("Serve", "Prepare", "Measure", "Look")]
    assert places == sorted(places)
    commands = ["serve", "chat", "plan", "quantize", "verify", "simulate", "bench", "doctor", "trace"]
    found = re.findall(r"^│ (\w+) ", shown, re.MULTILINE)
    assert [name for name in found if name in commands] == commands
