"""The HTTP API around a scripted engine: shapes, streams, errors, disconnects."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch

from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.placement.record import DistributionRecorder
from hetero_glm5.server import collectors, service, streaming

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}},
}


def pieces(text: str, size: int = 3):
    return lambda prompt: [text[i : i + size] for i in range(0, len(text), size)]


def wait_until(condition, seconds: float = 5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def test_text_completion(serve, fake_engine, tokenizer):
    served = serve(fake_engine(pieces("Hello, world")))
    answer = served.http.post(TEXT, json={"model": "tiny", "prompt": "Say", "max_tokens": 50}).json()
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "Hello, world", "logprobs": None, "finish_reason": "stop"}]
    count = len(tokenizer.encode("Say"))
    assert answer["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": 4,
        "total_tokens": count + 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_text_stream_of_several_prompts(serve, fake_engine):
    served = serve(fake_engine())
    prompts = [[1], [1, 2], [1, 2, 3]]
    chunks = served.chunks(TEXT, prompt=prompts, max_tokens=4, stream_options={"include_usage": True})
    assert chunks[-1] == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks[:-1]]
    texts, reasons = [""] * 3, [None] * 3
    for chunk in parsed[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [f" w{n}.0 w{n}.1 w{n}.2 w{n}.3" for n in (1, 2, 3)] and reasons == ["length"] * 3
    assert parsed[-1]["choices"] == [] and parsed[-1]["usage"]["completion_tokens"] == 12
    whole = served.http.post(TEXT, json={"prompt": prompts, "max_tokens": 4}).json()
    assert [choice["text"] for choice in whole["choices"]] == texts


def test_chat_with_reasoning_and_a_call_streamed_and_not(serve, fake_engine):
    pair = "<arg_key>city</arg_key><arg_value>Köln</arg_value>"
    said = f"Let me see.\n</think>Sure.\n<tool_call>get_weather{pair}</tool_call>"
    served = serve(fake_engine(pieces(said)), reasoning_parser="glm45", tool_call_parser="glm47")
    body = {**HI, "tools": [WEATHER]}
    whole = served.http.post(CHAT, json=body).json()
    (choice,) = whole["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and whole["object"] == "chat.completion"
    assert (choice["message"]["content"], choice["message"]["reasoning_content"]) == ("Sure.", "Let me see.")
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Köln"}'}
    details = whole["usage"]["completion_tokens_details"]
    assert 4 <= details["reasoning_tokens"] <= 8 < whole["usage"]["completion_tokens"]

    parsed = [json.loads(chunk) for chunk in served.chunks(CHAT, **body)[:-1]]
    choices = [chunk["choices"][0] for chunk in parsed]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls"}
    deltas = [choice["delta"] for choice in choices]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Let me see."
    assert "".join(delta.get("content", "") for delta in deltas) == "Sure."
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"] == {"name": "get_weather", "arguments": ""} and calls[0]["id"].startswith("call_")
    assert not any("id" in call or "name" in call["function"] for call in calls[1:])
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Köln"}'


def test_without_parser_flags_the_output_is_content(serve, fake_engine):
    served = serve(fake_engine(pieces("r</think>a")))
    answer = served.http.post(CHAT, json=HI).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "r</think>a"}
    assert "completion_tokens_details" not in answer["usage"]
    refused = served.http.post(CHAT, json={**HI, "tools": [WEATHER]})
    assert refused.status_code == 400 and "--tool-call-parser" in refused.json()["error"]["message"]
    assert served.http.post(CHAT, json={**HI, "tools": [WEATHER], "tool_choice": "none"}).status_code == 200


def test_thinking_is_judged_from_the_prompt(serve, fake_engine):
    served = serve(fake_engine(pieces("plain")), reasoning_parser="glm45")
    message = served.http.post(CHAT, json=HI).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": None, "reasoning_content": "plain"}
    off = {**HI, "chat_template_kwargs": {"enable_thinking": False}}
    message = served.http.post(CHAT, json=off).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "plain"}


def test_sampling_reaches_the_engine(serve, fake_engine):
    engine = fake_engine()
    served = serve(engine)
    served.http.post(TEXT, json={"prompt": "a", "max_tokens": 1, "temperature": 0, "seed": 3})
    (params,) = engine.params
    assert (params.max_tokens, params.temperature, params.seed, params.stop_token_ids) == (1, 0, 3, ())


def test_models(serve):
    served = serve()
    (card,) = served.http.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 1000)
    assert served.http.get("/v1/models/tiny").json() == card
    assert served.http.get("/v1/models/other/one").status_code == 404
    refused = served.http.post(CHAT, json={**HI, "model": "gpt-4"})
    assert refused.status_code == 404 and refused.json()["error"] == {
        "message": "The model 'gpt-4' does not exist; this server serves 'tiny'.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    "method, route, content, status, param, sentence",
    [
        ("GET", "/nowhere", None, 404, None, "GET /nowhere is not a route of this server."),
        ("POST", "/v1/embeddings", b"{}", 404, None, "not a route"),
        ("GET", CHAT, None, 405, None, "not allowed"),
        ("POST", CHAT, b'{"messages": [}', 400, None, "line 1 column 15"),
        ("POST", CHAT, b"{}", 400, "messages", "messages is missing."),
        ("POST", TEXT, b'{"prompt": [1], "n": 99}', 400, "n", "n is 99; it must be between 1 and 64"),
        ("POST", TEXT, b'{"prompt": [1], "top_p": 7}', 400, "top_p", "top_p is 7"),
        ("POST", TEXT, json.dumps({"prompt": [1] * 1000}).encode(), 400, "prompt", "context length"),
        ("POST", CHAT, b'{"messages": [{"role": "tool", "content": 5}]}', 400, "messages", "must be a string"),
        ("POST", CHAT, b'{"messages": []}', 400, "messages", "at least 1 item"),
    ],
)
def test_errors_have_openais_shape(serve, method, route, content, status, param, sentence):
    answer = serve().http.request(method, route, content=content)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert sentence in error["message"] and error["param"] == param


def test_a_prompt_that_is_too_long_is_told_as_agents_expect(serve):
    http = serve(reasoning_parser="glm45").http
    long = [{"role": "user", "content": "a b c d e " * 400}]
    for route, body in (
        ("/v1/chat/completions", {}),
        ("/v1/completions", {"prompt": [1] * 1001}),
        ("/v1/responses", {}),
    ):
        answer = http.post(route, json=body or {"input" if "resp" in route else "messages": long})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    answer = http.post("/v1/messages", json={"messages": long, "max_tokens": 9})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith("prompt is too long: ")


@pytest.mark.parametrize(
    "route, body, field",
    [
        (CHAT, HI, "max_tokens"),
        (CHAT, HI, "max_completion_tokens"),
        ("/v1/messages", HI, "max_tokens"),
        ("/v1/responses", {"input": "Hi"}, "max_output_tokens"),
    ],
)
def test_what_agents_allow_an_answer_may_be_more_than_there_is_room_for(serve, fake_engine, route, body, field):
    engine = fake_engine()
    assert serve(engine).http.post(route, json={**body, field: 64_000}).status_code == 200
    (params,) = engine.params
    assert 950 < params.max_tokens < 1000, "what the prompt leaves"


def test_template_kwargs_cannot_replace_the_messages(serve):
    body = {**HI, "max_tokens": 1, "chat_template_kwargs": {"messages": [], "self": 1}}
    assert serve().http.post(CHAT, json=body).status_code == 200


def test_bodies_are_limited(serve, monkeypatch):
    monkeypatch.setattr(service, "MAX_BODY_BYTES", 1000)
    answer = serve().http.post(TEXT, json={"prompt": "a" * 2000})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


def test_keys(serve):
    served = serve(api_key="séc")
    assert served.http.get("/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer nope"}, {"x-api-key": "s"}):
        answer = served.http.get("/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    for name, value in (("Authorization", "Bearer séc"), ("x-api-key", "séc")):
        headers = {name.encode(): value.encode()}
        assert served.http.get("/v1/models", headers=headers).status_code == 200


def test_health_tells_how_loading_goes(serve, fake_engine, halfway):
    go = threading.Event()

    def load(progress):
        progress(halfway)
        go.wait(10)
        return fake_engine()

    served = serve(load, wait=False)
    wait_until(lambda: served.worker.progress == halfway)
    health = served.http.get("/health")
    assert health.status_code == 503 and health.json() == {
        "status": "loading",
        "stage": "reading experts",
        "bytes_done": 2_000_000_000,
        "bytes_total": 6_000_000_000,
        "gb_per_s": 0.5,
        "eta_seconds": 8.0,
    }
    early = served.http.post(CHAT, json=HI)
    assert (early.status_code, early.headers["retry-after"]) == (503, "5")
    assert early.json()["error"]["code"] == "not_ready"
    go.set()
    wait_until(lambda: served.http.get("/health").status_code == 200)
    assert served.http.get("/health").json() == {"status": "ok"}


def test_a_full_queue_is_429(serve, fake_engine):
    served = serve(fake_engine(most_waiting=0))
    for stream in (False, True):
        answer = served.http.post(TEXT, json={"prompt": "a", "stream": stream})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")


def test_a_failing_step_is_an_error_event_or_a_500(serve, fake_engine):
    engine = fake_engine()
    served = serve(engine)
    steps = iter(range(100))

    def fail_third():
        if next(steps) % 3 == 2:
            raise ValueError("no luck")

    engine.before_step = fail_third
    chunks = served.chunks(TEXT, prompt="a")
    assert len(chunks) == 3 and "no luck" in json.loads(chunks[-1])["error"]["message"], "two tokens, then the error"
    answer = served.http.post(TEXT, json={"prompt": "a"})
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "generation_failed"
    engine.before_step = lambda: None
    assert served.http.post(TEXT, json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts(serve, fake_engine, stream):
    engine = fake_engine(lambda prompt: ["x"] * 1_000_000)
    engine.before_step = lambda: time.sleep(0.001)
    served = serve(engine)
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a", "stream": stream}).encode()
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        wait_until(lambda: engine.running)
    wait_until(lambda: len(engine.aborted) == 1)
    wait_until(lambda: served.worker.num_open == 0)


def test_headers_role_and_pings_come_during_a_long_step(serve, fake_engine, monkeypatch):
    monkeypatch.setattr(streaming, "SILENCE", 0.05)
    engine, hold = fake_engine(pieces("done")), threading.Event()
    engine.before_step = lambda: hold.wait(10)
    served = serve(engine)
    with served.http.stream("POST", CHAT, json={**HI, "stream": True}) as answer:
        lines = answer.iter_lines()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert '"role":"assistant"' in next(lines)
        assert next(line for line in lines if line) == ": ping"
        with httpx.stream(
            "POST", served.url + CHAT, json={**HI, "stream": True}
        ) as second:  # the engine is not listening
            assert '"role":"assistant"' in next(second.iter_lines())
        hold.set()
        assert '"content":"don"' in next(line for line in lines if line.startswith("data"))


def test_fifty_clients_at_once(serve, fake_engine):
    served = serve(fake_engine())
    answers: dict[int, str] = {}

    def ask(n: int) -> None:
        chunks = served.chunks(TEXT, prompt=[1] * n, max_tokens=30)[:-1]
        answers[n] = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)

    served.http = httpx.Client(base_url=served.url, timeout=30, limits=httpx.Limits(max_connections=60))
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, 51)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {n: "".join(f" w{n}.{i}" for i in range(30)) for n in range(1, 51)}


def test_pings_come_while_tokens_say_nothing_yet(serve, fake_engine, monkeypatch):
    monkeypatch.setattr(streaming, "SILENCE", 0.05)
    call = "<tool_call>get_weather<arg_key>days</arg_key><arg_value>[1, 2, 3, 4]</arg_value></tool_call>"
    engine = fake_engine(pieces(call))
    engine.before_step = lambda: time.sleep(0.02)
    served = serve(engine, tool_call_parser="glm47")
    parameters = {"properties": {"days": {"type": "array"}}}
    days = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    with served.http.stream("POST", CHAT, json={**HI, "tools": [days], "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert ": ping" in lines and lines[-1] == "data: [DONE]"
    told = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1] if line.startswith("data")]
    arguments = "".join(d["tool_calls"][0]["function"]["arguments"] for d in told if "tool_calls" in d)
    assert json.loads(arguments) == {"days": [1, 2, 3, 4]}


def test_too_many_prompts_or_too_long_ones_are_refused_unencoded(serve, tokenizer, monkeypatch):
    served = serve()
    encoded = []
    monkeypatch.setattr(tokenizer, "_tokenizer", SimpleNamespace(encode_batch_fast=encoded.append))
    many = served.http.post(TEXT, json={"prompt": ["a"] * 101})
    assert many.status_code == 400 and many.json()["error"]["param"] == "prompt"
    assert many.json()["error"]["message"].startswith("this request has 101 prompts to answer 1 times; at most 100")
    long = served.http.post(TEXT, json={"prompt": "a" * 1_000_000})
    assert (
        long.status_code == 400 and "has 1000000 bytes; the context length is 1000" in long.json()["error"]["message"]
    )
    stops = served.http.post(TEXT, json={"prompt": "a", "stop": ["a"] * 1_000_000})
    assert stops.status_code == 400 and stops.json()["error"]["param"] == "stop"
    assert not encoded


def test_half_a_surrogate_pair_in_tool_arguments_is_a_400(serve):
    call = {"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}
    answer = serve().http.post(CHAT, json={"messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert answer.status_code == 400 and "U+D83D" in answer.json()["error"]["message"]


@pytest.mark.parametrize("parameters", [5, {"properties": 5}, {"properties": {"city": {"anyOf": 5, "type": [{}]}}}])
def test_a_malformed_tool_schema_fails_no_request(serve, fake_engine, parameters):
    said = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>K</arg_value></tool_call>"
    served = serve(fake_engine(pieces(said)), tool_call_parser="glm47")
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    answer = served.http.post(CHAT, json={**HI, "tools": [tool]})
    assert answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "K"}'


def test_a_bug_while_streaming_is_an_error_event(serve, fake_engine, monkeypatch, caplog):
    def buggy(*args):
        raise ZeroDivisionError("oops")

    engine = fake_engine()
    served = serve(engine)
    monkeypatch.setattr(collectors.TextCollector, "tell", buggy)
    (chunk,) = served.chunks(TEXT, prompt="a")
    assert json.loads(chunk)["error"]["message"] == "Internal error: ZeroDivisionError: oops"
    wait_until(lambda: served.worker.num_open == 0)
    assert "a stream failed" in caplog.text


def test_a_client_that_leaves_while_sending_is_no_error(serve, caplog):
    served = serve()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        wait_until(lambda: served.server.server_state.tasks)
    wait_until(lambda: not served.server.server_state.tasks)
    assert served.http.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


START, STOP, DUMP = (f"/{verb}_expert_distribution_record" for verb in ("start", "stop", "dump"))


def recorded(engine, folder) -> list[int]:
    """Gives the engine a recorder that hears of each of its steps; returns a list whose length is how many it had."""
    engine.recorder, steps = DistributionRecorder(ModelConfig.parse(tiny_config()), str(folder), 10), []
    counts = np.ones((3, 16), dtype=np.int64)

    def observe():
        steps.append(1)
        engine.recorder.observe(counts, 2 * counts, counts > 0)
        time.sleep(0.001)

    engine.before_step = observe
    return steps


def test_the_expert_distribution_is_recorded_while_requests_run(serve, fake_engine, tmp_path):
    engine = fake_engine(lambda prompt: ["x"] * 100_000)
    steps = recorded(engine, tmp_path)
    served = serve(engine)
    files = []
    with served.http.stream("POST", TEXT, json={"prompt": "a", "max_tokens": 100_000, "stream": True}) as answer:
        lines = answer.iter_lines()  # without it the connection would be closed
        assert next(lines)
        began = len(steps)
        assert served.http.post(START).json() == {"recording": True}
        for _ in range(5):
            until = len(steps) + 4
            wait_until(lambda until=until: len(steps) >= until)
            files.append(served.http.post(DUMP).json())
        assert served.http.post(STOP).json() == {"recording": False}
        ended = len(steps)
        wait_until(lambda: len(steps) > ended + 3)
    total = sum(dump["steps"] for dump in files)
    assert 20 <= total <= ended - began
    for dump in files:
        data = torch.load(dump["file"], weights_only=True)
        assert data["decode_count"].sum() == dump["steps"] * 3 * 16 == data["prefill_count"].sum() / 2
        assert dump["hit_rate"] == {"decode": 1.0, "prefill": 1.0}


def test_recordings_that_cannot_be_are_told(serve, fake_engine, tmp_path):
    engine = fake_engine()
    recorded(engine, tmp_path)
    served = serve(engine, api_key="secret")
    assert served.http.post(START).status_code == 401
    served.http.headers["Authorization"] = "Bearer secret"
    for route, status, sentence in (
        (STOP, 400, "is not being recorded"),
        (DUMP, 400, "nothing to dump"),
        (START, 200, ""),
        (START, 400, "is being recorded already"),
        (DUMP, 400, "no step was computed"),
    ):
        answer = served.http.post(route)
        assert answer.status_code == status and sentence in answer.text
    assert served.http.post(TEXT, json={"prompt": "a", "max_tokens": 2}).status_code == 200
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    answer = served.http.post(DUMP)
    assert answer.status_code == 500 and "cannot be written" in answer.json()["error"]["message"]
    tmp_path.with_name("elsewhere").rename(tmp_path)
    assert served.http.post(DUMP).json()["steps"] == 2
    assert served.http.get(START).status_code == 405


def test_no_recording_while_loading(serve, fake_engine):
    go = threading.Event()
    served = serve(lambda progress: (go.wait(10), fake_engine())[1], wait=False)
    assert served.http.post(START).status_code == 503
    go.set()
