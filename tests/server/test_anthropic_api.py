"""/v1/messages around a scripted engine, through the official anthropic client."""

import json
import threading
import time

import anthropic
import httpx
import pytest
from scripted import CALL, pieces, starter

from hetero_glm5.server import streaming

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
HI = {"model": "tiny", "max_tokens": 500, "messages": [{"role": "user", "content": "Hi"}]}
THINKS = {**HI, "thinking": {"type": "enabled", "budget_tokens": 1024}}
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}


@pytest.fixture
def client(serve, fake_engine):
    """client(text): a client of a server whose model always says `text`."""
    return starter(
        serve, fake_engine, lambda url: anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=20)
    )


def test_text(client, tokenizer):
    message = client("Hello, world").messages.create(**HI)
    (block,) = message.content
    assert (block.type, block.text) == ("text", "Hello, world")
    assert (message.stop_reason, message.stop_sequence, message.model, message.role) == (
        "end_turn",
        None,
        "tiny",
        "assistant",
    )
    prompt = tokenizer.encode(tokenizer.render_chat(HI["messages"], None, enable_thinking=False))
    usage = message.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(prompt), 4)
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (0, 0)


def test_thinking_text_and_calls_streamed_and_not(client):
    asking = client(f"Let me see.\n</think>Sure.\n{CALL}\n{CALL}")
    ask = {**THINKS, "tools": [WEATHER]}
    whole = asking.messages.create(**ask)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert whole.content[0].thinking == "Let me see." and whole.content[0].signature
    assert whole.content[1].text == "Sure."
    assert whole.content[2].input == {"city": "Köln", "days": 3} and whole.content[2].name == "get_weather"
    assert whole.content[2].id.startswith("toolu_") and whole.content[2].id != whole.content[3].id
    assert whole.stop_reason == "tool_use" and 0 < whole.usage.output_tokens_details.thinking_tokens < 10

    with asking.messages.stream(**ask) as stream:
        types = [event.type for event in stream]
        streamed = stream.get_final_message()
    for block in (*whole.content, *streamed.content):
        if block.type == "tool_use":
            block.id = "an id"
    assert [block.to_dict() for block in streamed.content] == [block.to_dict() for block in whole.content]
    assert (streamed.stop_reason, streamed.usage) == (whole.stop_reason, whole.usage)
    assert types[0] == "message_start" and types[-1] == "message_stop"


def test_the_events_of_a_stream(client):
    asking = client(f"r</think>a{CALL}")
    lines: list[tuple[str, dict]] = []
    with asking.served.http.stream("POST", MESSAGES, json={**THINKS, "tools": [WEATHER], "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                lines.append((name, json.loads(line.removeprefix("data: "))))
    assert all(name == event["type"] for name, event in lines)
    events = [event for _, event in lines]
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["input_tokens"] > 0
    outline = [event["type"].removeprefix("content_block_") for event in events if "delta" not in event["type"]]
    assert outline == ["message_start", *["start", "stop"] * 3, "message_stop"]
    assert [event["content_block"] for event in events if event["type"] == "content_block_start"][:2] == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": ""},
    ]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert {delta["type"] for delta in deltas} == {
        "thinking_delta",
        "signature_delta",
        "text_delta",
        "input_json_delta",
    }
    fragments = [delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta"]
    assert len(fragments) > 1 and json.loads("".join(fragments)) == {"city": "Köln", "days": 3}
    assert events[-2]["type"] == "message_delta" and events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] > events[0]["message"]["usage"]["output_tokens"] == 0


def test_stop_reasons(client):
    asking = client("one two three")
    assert asking.messages.create(**{**HI, "max_tokens": 2}).stop_reason == "max_tokens"
    cut = client(CALL).messages.create(**{**HI, "max_tokens": 20, "tools": [WEATHER]})
    assert cut.stop_reason == "max_tokens" and cut.content == [], "half a call could do harm"


def test_without_thinking_the_turn_does_not_think(client, fake_engine):
    prompts = []
    engine = fake_engine(lambda prompt: prompts.append(prompt) or ["ok"])
    asking = client("", engine)
    for thinking in (None, {"type": "disabled"}, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 2000}):
        asking.messages.create(**HI, **({} if thinking is None else {"thinking": thinking}))
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]


def test_one_call_if_parallel_ones_are_disabled(client):
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = client(f"{CALL}{CALL}").messages.create(**HI, tools=[WEATHER], tool_choice=choice)
    assert [block.type for block in message.content] == ["tool_use"]


def test_what_is_asked_of_the_engine(client, fake_engine):
    engine = fake_engine(pieces("x"))
    asking = client("", engine)
    ask = {**HI, "tools": [WEATHER], "tool_choice": {"type": "any"}}
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 7}  # the client knows them no more
    asking.messages.create(**ask, stop_sequences=["a", "b"], extra_body=sampling)
    (params,) = engine.params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 7, 500)
    assert params.stop == ("a", "b") and "get_weather" in params.grammar.text
    asking.messages.create(**{**ask, "tool_choice": {"type": "none"}})
    asking.messages.create(**{**ask, "tool_choice": {"type": "auto"}})
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asking.messages.create(**HI, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert [bool(params.grammar) for params in engine.params] == [True, False, False, True]


def test_count_tokens(client):
    asking = client("x")
    counted = asking.messages.count_tokens(
        model="tiny", messages=HI["messages"], system="Be brief.", tools=[WEATHER], thinking={"type": "adaptive"}
    )
    message = asking.messages.create(
        **HI, system=[{"type": "text", "text": "Be brief."}], tools=[WEATHER], thinking={"type": "adaptive"}
    )
    assert counted.input_tokens == message.usage.input_tokens > 100
    assert asking.served.http.post(COUNT, json={**HI, "stream": True}).status_code == 200
    assert not asking.served.worker.busy


@pytest.mark.parametrize(
    "body, status, kind, sentence",
    [
        ({**HI, "model": "claude"}, 404, "not_found_error", "this server serves 'tiny'"),
        ({**HI, "max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({**HI, "top_p": 7}, 400, "invalid_request_error", "top_p is 7"),
        ({**HI, "mcp_servers": [{}]}, 400, "invalid_request_error", "mcp_servers is not supported"),
        ({**HI, "surprise": 1}, 400, "invalid_request_error", "surprise is not a field"),
        ({**HI, "tool_choice": {"type": "any"}}, 400, "invalid_request_error", "no tools"),
        ({**HI, "messages": [{"role": "user", "content": "a" * 9000}]}, 400, "invalid_request_error", "context length"),
    ],
)
def test_errors_have_anthropics_shape(client, body, status, kind, sentence):
    answer = client("x").served.http.post(MESSAGES, json=body)
    assert answer.status_code == status
    told = answer.json()
    assert told["type"] == "error" and set(told) == {"type", "error"}
    assert told["error"]["type"] == kind and sentence in told["error"]["message"]


def test_keys_and_loading(client, serve, fake_engine):
    asking = client("x", api_key="secret")
    with pytest.raises(anthropic.AuthenticationError, match="API key") as refused:
        asking.messages.create(**HI)
    assert refused.value.body["error"]["type"] == "authentication_error"
    assert anthropic.Anthropic(base_url=asking.served.url, api_key="secret").messages.create(**HI).content
    go = threading.Event()
    served = serve(lambda progress: (go.wait(10), fake_engine())[1], wait=False)
    answer = served.http.post(MESSAGES, json=HI)
    assert answer.status_code == 503 and answer.json()["error"]["type"] == "overloaded_error"
    assert answer.headers["retry-after"]
    go.set()


def test_an_error_after_the_first_byte_is_an_event(client, fake_engine):
    engine = fake_engine(pieces("Hello, world"))
    steps = iter(range(9))

    def fail_third():
        if next(steps) == 2:
            raise ValueError("no luck")

    engine.before_step = fail_third
    with pytest.raises(anthropic.APIError, match="no luck"), client("", engine).messages.stream(**HI) as stream:
        assert [event.text for event in stream if event.type == "text"] and False


def test_pings_come_during_a_long_step(client, fake_engine, monkeypatch):
    monkeypatch.setattr(streaming, "SILENCE", 0.05)
    engine, hold = fake_engine(pieces("done")), threading.Event()
    engine.before_step = lambda: hold.wait(10)
    served = client("", engine).served
    with served.http.stream("POST", MESSAGES, json={**HI, "stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: message_start"
        assert next(line for line in lines if line.startswith("event")) == "event: ping"
        assert next(lines) == 'data: {"type":"ping"}'
        hold.set()
        assert [line for line in lines if line.startswith("event")][-1] == "event: message_stop"


def test_a_client_that_leaves_aborts(client, fake_engine):
    engine = fake_engine(lambda prompt: ["x"] * 900)
    engine.before_step = lambda: time.sleep(0.005)
    served = client("", engine).served
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}{MESSAGES}", json={**HI, "max_tokens": 900}, timeout=0.3)
    end = time.monotonic() + 5
    while not engine.aborted:
        assert time.monotonic() < end
        time.sleep(0.01)
