"""/v1/responses around a scripted engine, through the official openai client."""

import json
import threading

import openai
import pytest
from pydantic import BaseModel
from scripted import CALL, pieces, starter

from hetero_glm5.server import openresponses_api, streaming
from hetero_glm5.server.openresponses_protocol import ResponsesRequest
from hetero_glm5.server.protocol import parse_request

ROUTE = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
ARGUMENTS = {"city": "Köln", "days": 3}


@pytest.fixture
def client(serve, fake_engine):
    """client(text): a client of a server whose model always says `text`."""
    return starter(
        serve, fake_engine, lambda url: openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)
    )


@pytest.fixture
def listening(fake_engine):
    """An engine that always says "Well.</think>Yes.", and the list of prompts that it was given."""
    prompts: list[list[int]] = []
    return fake_engine(lambda prompt: prompts.append(prompt) or ["Well.", "</think>", "Yes."]), prompts


def without_ids(items) -> list[dict]:
    return [{k: v for k, v in item.to_dict().items() if k not in ("id", "call_id")} for item in items]


def test_reasoning_text_and_calls_streamed_and_not(client):
    asking = client(f"Let me see.\n</think>Sure.\n{CALL}\n{CALL}")
    ask = {"model": "tiny", "input": "Weather?", "tools": [WEATHER]}
    whole = asking.responses.create(**ask)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert whole.output[0].content[0].text == "Let me see." and whole.output_text == "Sure."
    first, second = whole.output[2:]
    assert first.name == "get_weather" and json.loads(first.arguments) == ARGUMENTS
    assert first.call_id.startswith("call_") and first.id.startswith("fc_") and first.call_id != second.call_id
    assert whole.status == "completed" and whole.id.startswith("resp_") and whole.tools[0].name == "get_weather"
    assert 0 < whole.usage.output_tokens_details.reasoning_tokens < 10 < whole.usage.output_tokens
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens

    with asking.responses.stream(**ask) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    assert streamed.output_text == "Sure." and len(streamed.output) == 4
    *_, last = asking.responses.create(**ask, stream=True)
    assert without_ids(last.response.output) == without_ids(whole.output) and last.response.usage == whole.usage
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_events_of_a_stream(client):
    events = [
        json.loads(data) for data in client(f"r</think>a{CALL}").served.chunks(ROUTE, input="Hi", tools=[WEATHER])
    ]
    outline = [event["type"].removeprefix("response.") for event in events]
    assert outline[:2] == ["created", "in_progress"] and outline[-1] == "completed"
    part = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done", "output_item.done"]
    call = ["output_item.added", *["function_call_arguments.delta"] * 10, "function_call_arguments.done"]
    told = [kind for i, kind in enumerate(outline) if kind != outline[i - 1] or "delta" not in kind]
    assert told[2:-1] == [
        *[kind.format("reasoning_text") for kind in part],
        *[kind.format("output_text") for kind in part],
        *dict.fromkeys(call),
        "output_item.done",
    ]
    fragments = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
    assert len(fragments) > 1 and json.loads("".join(fragments)) == ARGUMENTS
    ids = {event["item_id"] for event in events if "item_id" in event}
    assert ids == {item["id"] for item in events[-1]["response"]["output"]} and len(ids) == 3
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None


def test_what_is_asked_of_the_engine(client, fake_engine):
    engine = fake_engine(pieces("x"))
    asking = client("", engine)
    ask = {"model": "tiny", "input": "Hi"}
    asking.responses.create(**ask, max_output_tokens=7, temperature=0.5, top_p=0.9)
    (params,) = engine.params
    assert (params.max_tokens, params.temperature, params.top_p, params.grammar) == (7, 0.5, 0.9, None)
    only = {"type": "function", "name": "get_weather"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [only]}
    other = {**WEATHER, "name": "other"}
    for choice in ("required", only, allowed):
        asking.responses.create(**ask, tools=[WEATHER, other], tool_choice=choice, parallel_tool_calls=False)
    texts = [params.grammar.text for params in engine.params[1:]]
    assert ["other" in text for text in texts] == [True, False, False] and all("get_weather" in t for t in texts)
    asking.responses.create(**ask, tools=[WEATHER], tool_choice="none", parallel_tool_calls=False)
    assert engine.params[-1].grammar is None


class Answer(BaseModel):
    n: int


def test_structured_output(client, fake_engine):
    engine = fake_engine(pieces('easy</think>{"n": 4}'))
    asking = client("", engine)
    parsed = asking.responses.parse(model="tiny", input="2 + 2", text_format=Answer)
    assert parsed.output_parsed == Answer(n=4) and "integer" in engine.params[0].grammar.text
    asking.responses.create(model="tiny", input="2 + 2", text={"format": {"type": "json_object"}})
    assert "%json" in engine.params[1].grammar.text


def test_an_answer_is_continued_by_its_id(client, listening):
    engine, prompts = listening
    asking = client("", engine)
    ask = {"model": "tiny", "instructions": "Be brief."}
    first = asking.responses.create(**ask, input="One?")
    second = asking.responses.create(**ask, input="Two?", previous_response_id=first.id)
    third = asking.responses.create(**ask, input="Three?", previous_response_id=second.id, store=False)
    by_hand = [{"role": "user", "content": "One?"}, *first.output, {"role": "user", "content": "Two?"}, *second.output]
    asking.responses.create(**ask, input=[*by_hand, {"role": "user", "content": "Three?"}])
    assert prompts[2] == prompts[3] and prompts[1][: len(prompts[0])] == prompts[0]
    assert third.previous_response_id == second.id
    for unkept in (third.id, "resp_0"):
        with pytest.raises(openai.BadRequestError, match="is not kept any more, or never was") as refused:
            asking.responses.create(**ask, input="Four?", previous_response_id=unkept)
        assert refused.value.param == "previous_response_id"


def test_the_oldest_answers_are_forgotten(client, listening, monkeypatch):
    monkeypatch.setattr(openresponses_api, "MOST_CHARACTERS", 700)
    asking = client("", listening[0])
    ids = [asking.responses.create(model="tiny", input="Hi").id for _ in range(5)]
    asking.responses.create(model="tiny", input="Go on.", previous_response_id=ids[-1])
    with pytest.raises(openai.BadRequestError, match="is not kept"):
        asking.responses.create(model="tiny", input="Go on.", previous_response_id=ids[0])


def test_all_of_an_answers_text_counts_when_it_is_kept(client, listening, monkeypatch):
    monkeypatch.setattr(openresponses_api, "MOST_CHARACTERS", 1000)
    asking = client("", listening[0])
    called = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}
    result = {"type": "function_call_output", "call_id": "c", "output": "x"}
    for long in ({"name": "f" * 600}, {"call_id": "c" * 600}):
        kept = asking.responses.create(model="tiny", input=[called | long, result])
        with pytest.raises(openai.BadRequestError, match="is not kept"):
            asking.responses.create(model="tiny", input="Go on.", previous_response_id=kept.id)
    kept = asking.responses.create(model="tiny", input=[called, result])
    asking.responses.create(model="tiny", input="Go on.", previous_response_id=kept.id)


def test_an_assistants_items_are_one_message():
    """Joined one by one, these would take minutes."""
    said = {"role": "assistant", "content": "a" * 300}
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    calls = [call | {"call_id": f"c{i}"} for i in range(100_000)]
    items = [*[said] * 50_000, *calls, {"type": "reasoning", "summary": []}, said]
    asked = parse_request(ResponsesRequest, json.dumps({"input": items}).encode())
    first, second = asked.input
    assert len(first["content"]) == 15_000_000 and second["content"] == said["content"]
    assert [call["id"] for call in first["tool_calls"]] == [call["call_id"] for call in calls]


def test_reasoning_comes_back_encoded(client, listening):
    engine, prompts = listening
    asking = client("", engine)
    first = asking.responses.create(model="tiny", input="One?")
    reasoning, message = (item.to_dict() for item in first.output)
    turns = [{"role": "user", "content": "One?"}, message, {"role": "user", "content": "Two?"}]
    variants = [reasoning, {**reasoning, "content": None}, {**reasoning, "encrypted_content": None}]
    for variant in variants:
        asking.responses.create(model="tiny", input=[turns[0], variant, *turns[1:]])
    foreign = {**reasoning, "content": None, "encrypted_content": "gAAAA"}
    asking.responses.create(model="tiny", input=[turns[0], foreign, *turns[1:]])
    assert prompts[1] == prompts[2] == prompts[3] != prompts[4] and len(prompts[4]) < len(prompts[3])


def test_an_answer_that_is_cut_off_is_incomplete(client):
    asking = client(CALL)
    cut = asking.responses.create(
        model="tiny", input="Hi", tools=[WEATHER], max_output_tokens=20, reasoning={"effort": "none"}
    )
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output[0].status == "incomplete"
    events = asking.served.chunks(ROUTE, input="Hi", max_output_tokens=2)
    assert json.loads(events[-1])["type"] == "response.incomplete"


@pytest.mark.parametrize(
    "body, status, param, sentence",
    [
        ({}, 400, "input", "input is missing"),
        ({"input": [{"type": "image"}]}, 400, "input", "item of type 'image' at [0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            400,
            "input",
            "part of type 'input_image' at [0]",
        ),
        ({"input": [{"role": "robot", "content": "a"}]}, 400, "input", "'robot'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, 400, "input", "arguments is missing"),
        ({"input": "a", "background": True}, 400, "background", "background is not supported"),
        ({"input": "a", "surprise": 1}, 400, "surprise", "not a field"),
        ({"input": "a", "tool_choice": "required"}, 400, "tool_choice", "no tools"),
        ({"input": "a", "tool_choice": {"type": "web_search"}}, 400, "tool_choice", "allowed_tools"),
        ({"input": "a", "include": ["message.output_text.logprobs"]}, 400, "include", "not supported"),
        ({"input": "a", "model": "gpt"}, 404, "model", "does not exist"),
        ({"input": "a", "max_output_tokens": 0}, 400, "max_output_tokens", "greater than or equal to 1"),
    ],
)
def test_errors(client, body, status, param, sentence):
    answer = client("x").served.http.post(ROUTE, json=body)
    assert answer.status_code == status and answer.json()["error"]["param"] == param
    assert sentence in answer.json()["error"]["message"]


def test_an_error_after_the_first_byte_is_an_event(client, fake_engine):
    engine = fake_engine(pieces("Hello, world"))
    steps = iter(range(9))

    def fail_third():
        if next(steps) == 2:
            raise ValueError("no luck")

    engine.before_step = fail_third
    events = [json.loads(data) for data in client("", engine).served.chunks(ROUTE, input="Hi")]
    assert events[-1]["type"] == "response.failed" and "no luck" in events[-1]["response"]["error"]["message"]


def test_pings_come_during_a_long_step(client, fake_engine, monkeypatch):
    monkeypatch.setattr(streaming, "SILENCE", 0.05)
    engine, hold = fake_engine(pieces("done")), threading.Event()
    engine.before_step = lambda: hold.wait(10)
    served = client("", engine).served
    with served.http.stream("POST", ROUTE, json={"input": "Hi", "stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: response.created"
        assert next(line for line in lines if line.startswith(":")) == ": ping"
        hold.set()
        assert [line for line in lines if line.startswith("event")][-1] == "event: response.completed"
