"""Sampled turns come back as the same text, whatever a client made of them."""

import dataclasses
import json
import random
from types import SimpleNamespace

import openai
import pytest

from hetero_glm5.core import SamplingParams, Sequence, TokenEvent
from hetero_glm5.demo.chat_template import CHAT_TEMPLATE
from hetero_glm5.demo.tokenizer import build_tokenizer
from hetero_glm5.server.anthropic_api import MessageTeller
from hetero_glm5.server.anthropic_protocol import MessagesRequest
from hetero_glm5.server.chat_template import ChatTemplate
from hetero_glm5.server.openresponses_api import ResponseTeller
from hetero_glm5.server.openresponses_protocol import ResponsesRequest
from hetero_glm5.server.replay import Replay, SampledTurn
from hetero_glm5.server.tokenizer import SamplingDefaults, Tokenizer
from hetero_glm5.server.turn import Turn

BREAKING = CHAT_TEMPLATE.replace("'<tool_call>' ~ function.name", "'\\n<tool_call>' ~ function.name ~ '\\n'")
assert BREAKING != CHAT_TEMPLATE
SCHEMA = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "n": {"type": "number"}, "edit": {"type": "object"}},
}
BILLING = "x-anthropic-billing-header: cc_version=2; cch={};\n"


VOCABULARY = build_tokenizer(600)


def service(template: str = CHAT_TEMPLATE) -> SimpleNamespace:
    tokenizer = Tokenizer(VOCABULARY, ChatTemplate({"default": template}, {}, "test"))
    config = SimpleNamespace(tool_call_parser="glm47", reasoning_parser="glm45")
    known = {"tokenizer": tokenizer, "replay": Replay(), "config": config, "encode": tokenizer.encode}
    return SimpleNamespace(fitting=lambda params, prompt: params, **known)


def sample(turn: Turn, text: str) -> None:
    """The engine says `text`, in one step."""
    seq = Sequence(list(turn.prompt), turn.params, len(turn.prompt))
    turn.tell(TokenEvent(seq, 1, text, "stop"))


def said(draw: random.Random, *, thinking: bool) -> str:
    """A turn as a model might write it, and as no client would write it again."""
    blanks = ["", " ", "\n"]
    numbers = ["3", "3.0", "1e3", "0.10", "-0"]
    edits = ['{"b":1,"a":[1,2]}', '{ "a" : "\\u00e9" }', '{"x": 1e2}']
    calls = [
        f"<tool_call>edit{draw.choice(blanks)}"
        f"<arg_key>path</arg_key>{draw.choice(blanks)}<arg_value> src/{draw.randrange(99)}.py </arg_value>"
        f"<arg_key>n</arg_key><arg_value>{draw.choice(numbers)}</arg_value>"
        f"<arg_key>edit</arg_key><arg_value>{draw.choice(edits)}</arg_value></tool_call>"
        for _ in range(draw.randrange(3))
    ]
    reasoning = draw.choice(["", "Hm.", "\nI look at it. "]) + draw.choice(blanks) + "</think>"
    content = draw.choice(["", "\n\n", "\nI shall see.\n"]) if calls else f"\n{draw.randrange(10**6)} it is.\n"
    return (reasoning if thinking else "") + content + draw.choice(blanks).join(calls)


def messages_turn(server, history: list, number: int, *, thinking: bool) -> Turn:
    asked = MessagesRequest.model_validate(
        {
            "max_tokens": 100,
            "system": [{"type": "text", "text": BILLING.format(number)}, {"type": "text", "text": "Be brief."}],
            "messages": history,
            "tools": [{"name": "edit", "input_schema": SCHEMA}],
            "thinking": {"type": "adaptive" if thinking else "disabled"},
        }
    )
    return Turn(server, asked.asked(asked.sampling(SamplingDefaults())), "toolu_")


def responses_turn(server, history: list, number: int, *, thinking: bool) -> tuple[Turn, ResponsesRequest]:
    asked = ResponsesRequest.model_validate(
        {
            "instructions": BILLING.format(number) + "Be brief.",
            "input": history,
            "tools": [{"type": "function", "name": "edit", "parameters": SCHEMA}],
            "reasoning": {"effort": None if thinking else "none"},
        }
    )
    return Turn(server, asked.asked([], asked.sampling(SamplingDefaults())), "call_"), asked


def serialised_anew(value):
    """What becomes of JSON in a client that sorts keys and writes its own numbers."""

    def number(text: str) -> float:
        return int(float(text)) if float(text).is_integer() else float(text)

    return json.loads(json.dumps(value, sort_keys=True), parse_float=number)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, BREAKING], ids=["GLM-5", "line breaks"])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("api", ["messages", "responses"])
def test_each_prompt_begins_with_the_last_one_and_its_answer(api, thinking, template):
    draw, server = random.Random(5), service(template)
    history: list = [{"role": "user", "content": "Begin."}]
    so_far: list[int] = []
    calls = 0
    for number in range(20):
        make = messages_turn if api == "messages" else responses_turn
        made = make(server, history, number, thinking=thinking)
        turn, asked = made if isinstance(made, tuple) else (made, None)
        assert turn.prompt[: len(so_far)] == so_far and len(turn.prompt) > len(so_far)
        text = said(draw, thinking=thinking)
        sample(turn, text)
        so_far = turn.prompt + server.tokenizer.encode(text)
        ids = [part.id for part in turn.parts if part.kind == "call"]
        calls += len(ids)
        if asked is None:
            history.append(
                {"role": "assistant", "content": serialised_anew(MessageTeller(turn, "m").whole()["content"])}
            )
            results = [{"type": "tool_result", "tool_use_id": name, "content": f"Done {number}"} for name in ids]
            history.append({"role": "user", "content": results or "Go on."})
        else:
            history += ResponseTeller(turn, asked, "m", [], None).whole()["output"]
            history += [{"type": "function_call_output", "call_id": name, "output": "Done"} for name in ids] or [
                {"role": "user", "content": "Go on."}
            ]
    assert calls >= 10


def test_without_replay_they_would_not(monkeypatch):
    draw, server = random.Random(5), service()
    monkeypatch.setattr(server.replay, "find", lambda message: None)
    turn = messages_turn(server, [{"role": "user", "content": "Begin."}], 0, thinking=True)
    text = "Hm.\n</think>\n" + said(draw, thinking=False)
    sample(turn, text)
    answer = {"role": "assistant", "content": MessageTeller(turn, "m").whole()["content"]}
    history = [{"role": "user", "content": "Begin."}, answer, {"role": "user", "content": "Go on."}]
    so_far = turn.prompt + server.tokenizer.encode(text)
    assert messages_turn(server, history, 1, thinking=True).prompt[: len(so_far)] != so_far


CALL = '<tool_call>f<arg_key>a</arg_key><arg_value>{"b":1}</arg_value></tool_call>'
TURN = SampledTurn(f"Hm.</think>\nYes. {CALL}", True, "Hm.", "Yes.", (("c1", "f", '{"a": {"b":1}}'),))


def message(**changes) -> dict:
    call = {"id": "c1", "function": {"name": "f", "arguments": {"a": {"b": 1}}}}
    return {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm.", "tool_calls": [call]} | changes


def rendered(replay: Replay, *messages: dict) -> str:
    return replay.render(service().tokenizer, [{"role": "user", "content": "Hi"}, *messages], None)


def test_a_turn_that_says_what_was_told_is_replayed():
    replay = Replay()
    replay.remember(TURN)
    assert TURN.text in rendered(replay, message())
    assert TURN.text in rendered(replay, message(content=[{"type": "text", "text": " Yes.\n"}]))
    without = rendered(replay, message(reasoning_content=None))
    assert f"<|assistant|></think>{TURN.answer}" in without and "Hm." not in without
    assert rendered(replay, message()).endswith(f"<think>{TURN.text}<|assistant|><think>")


@pytest.mark.parametrize(
    "changes",
    [
        {"content": "No."},
        {"reasoning_content": "Ah."},
        {"tool_calls": []},
        {"tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": '{"a": {"b": 2}}'}}]},
        {"tool_calls": [{"id": "c1", "function": {"name": "g", "arguments": '{"a": {"b": 1}}'}}]},
        {"tool_calls": [{"id": "c2", "function": {"name": "f", "arguments": '{"a": {"b": 1}}'}}]},
    ],
)
def test_a_turn_that_says_something_else_is_rendered_as_it_says(changes):
    replay = Replay()
    replay.remember(TURN)
    assert rendered(replay, message(**changes)) == rendered(Replay(), message(**changes))
    assert replay.find(message()) is TURN


def test_the_oldest_are_forgotten():
    replay = Replay(most_characters=20)
    for i in range(3):
        replay.remember(SampledTurn("x" * 10, False, "", f"answer {i}", ()))
    found = [replay.find({"role": "assistant", "content": f"answer {i}"}) is not None for i in range(3)]
    assert found == [False, True, True]


@pytest.mark.parametrize("stream", [True, False])
def test_chat_completions_share_it(serve, fake_engine, tokenizer, stream):
    said = f"\nHm.\n</think>\nI look.\n{CALL}"
    prompts: list[list[int]] = []
    engine = fake_engine(lambda prompt: prompts.append(prompt) or [said])
    served = serve(engine, reasoning_parser="glm45", tool_call_parser="glm47")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0).chat.completions
    parameters = {"type": "object", "properties": {"a": {"type": "object"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    ask = {"model": "tiny", "tools": tools}
    history = [{"role": "user", "content": "Begin."}]
    if stream:
        with client.stream(**ask, messages=history) as chunks:
            answer = chunks.get_final_completion().choices[0].message
    else:
        answer = client.create(**ask, messages=history).choices[0].message
    (call,) = answer.tool_calls
    call.function.arguments = json.dumps(json.loads(call.function.arguments), indent=1)
    sent = {"role": "assistant", "content": answer.content, "tool_calls": [call], "reasoning_content": "Hm."}
    client.create(**ask, messages=[*history, sent, {"role": "tool", "tool_call_id": call.id, "content": "1"}])
    so_far = prompts[0] + tokenizer.encode(said)
    assert prompts[1][: len(so_far)] == so_far


@pytest.mark.parametrize("untold", [CALL + CALL, CALL.replace(">f<", ">g<") + CALL])
def test_a_turn_with_a_call_that_nobody_will_answer_is_not_replayed(untold):
    replay = Replay()
    replay.remember(dataclasses.replace(TURN, text=f"Hm.</think>{untold}"))
    assert replay.find(message()) is None


def test_what_was_cut_off_is_not_remembered():
    server = service()
    turn = messages_turn(server, [{"role": "user", "content": "Begin."}], 0, thinking=True)
    seq = Sequence(list(turn.prompt), SamplingParams(), len(turn.prompt))
    turn.tell(TokenEvent(seq, 1, "Hm.</think>Well", "length"))
    assert turn.parts[-1].text == "Well" and server.replay.find({"role": "assistant", "content": "Well"}) is None
