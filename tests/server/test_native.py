"""SGLang's and vLLM's own routes around a scripted engine."""

import json
import threading
import time

import pytest

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}


def test_tokens_there_and_back(serve, tokenizer):
    http = serve().http
    text = "One é <think>"
    told = http.post("/tokenize", json={"prompt": text, "model": "tiny"}).json()
    assert told == {"tokens": tokenizer.encode(text), "count": len(tokenizer.encode(text)), "max_model_len": 1000}
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text, "text": text}
    many = http.post("/tokenize", json={"prompt": ["a", "bc"]}).json()
    assert many["tokens"] == [tokenizer.encode("a"), tokenizer.encode("bc")]
    assert http.post("/detokenize", json={"tokens": many["tokens"]}).json()["text"] == ["a", "bc"]
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    said = tokenizer.decode(http.post("/tokenize", json=chat).json()["tokens"])
    assert said == tokenizer.render_chat(chat["messages"], None) and said.endswith("<think>")


@pytest.mark.parametrize(
    "route, body, param",
    [
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "x": 1}, "x"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens"),
        ("/tokenize", {"prompt": [5, "a"]}, "prompt"),
        ("/v1/completions", {"prompt": [2**40], "echo": True}, "prompt"),
        ("/abort_request", {}, "rid"),
        ("/parse_function_call", {"text": "a", "tools": [], "tool_call_parser": "qwen"}, "tool_call_parser"),
        ("/separate_reasoning", {"reasoning_parser": "glm45"}, "text"),
        ("/generate", {}, "text"),
        ("/generate", {"text": "a", "input_ids": [1]}, "text"),
        ("/generate", {"text": [1]}, "text"),
        ("/generate", {"input_ids": "a"}, "input_ids"),
        ("/generate", {"text": "a", "image_data": "x"}, "image_data"),
        ("/generate", {"text": "a", "sampling_params": {"ebnf": "x"}}, "sampling_params"),
        ("/generate", {"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
        ("/generate", {"text": "a", "sampling_params": {"n": 101}}, "n"),
        ("/generate", {"text": "a", "sampling_params": {"no_stop_trim": True}}, "sampling_params"),
        ("/generate", {"text": "a", "return_logprob": True, "top_logprobs_num": 30}, "logprobs"),
    ],
)
def test_refusals_name_the_field(serve, route, body, param):
    answer = serve().http.post(route, json=body)
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param


def test_generate_whole_streamed_and_of_several(serve, fake_engine):
    engine = fake_engine()
    http = (served := serve(engine)).http
    body = {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2, "temperature": 0, "stop": None}, "rid": "r"}
    whole = http.post("/generate", json=body).json()
    assert (whole["text"], whole["output_ids"]) == (" w2.0 w2.1", [1, 1])
    meta = whole["meta_info"]
    assert meta["id"] == "r" and meta["finish_reason"] == {"type": "length", "length": 2}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (2, 2, 0)
    chunks = [json.loads(chunk) for chunk in served.chunks("/generate", **body)[:-1]]
    assert [chunk["text"] for chunk in chunks] == [" w2.0", " w2.0 w2.1"], "each tells all"
    assert [chunk["meta_info"]["finish_reason"] and 1 for chunk in chunks] == [None, 1]
    several = http.post("/generate", json={**body, "input_ids": [[1], [1, 2]]}).json()
    assert [one["text"] for one in several] == [" w1.0 w1.1", " w2.0 w2.1"]
    assert {
        json.loads(chunk)["index"]
        for chunk in served.chunks("/generate", **{**body, "text": ["a", "b"], "input_ids": None})[:-1]
    } == {0, 1}
    assert len(http.post("/generate", json={**body, "input_ids": [[1]]}).json()) == 1
    assert engine.params[0].max_tokens == 2
    http.post("/generate", json={"text": "a"})
    assert engine.params[-1].max_tokens == 128, "SGLang's default"


def test_a_request_is_aborted_by_any_of_its_names(serve, fake_engine):
    engine = fake_engine(lambda prompt: ["x"] * 1_000_000)
    engine.before_step = lambda: time.sleep(0.001)
    served = serve(engine)
    cases = (
        ("/generate", {"text": "a", "rid": "mine", "sampling_params": {"max_new_tokens": 900_000}}, {"rid": "mine"}),
        ("/v1/completions", {"prompt": "a"}, {"rid": "header"}),
        ("/v1/completions", {"prompt": "a"}, {"rid": "cmpl-header"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "rid": "x"}, {"rid": "x"}),
        ("/v1/completions", {"prompt": ["a", "b"]}, {"abort_all": True}),
    )
    for route, body, named in cases:
        answers = []

        def ask(route=route, body=body, answers=answers):
            answers.append(served.http.post(route, json=body, headers={"X-Request-Id": "header"}).json())

        asking = threading.Thread(target=ask)
        asking.start()
        until = time.monotonic() + 10
        while not engine.running and time.monotonic() < until:
            time.sleep(0.002)
        assert served.http.post("/abort_request", json={"rid": "nobody"}).json() == {"aborted": 0}
        assert served.http.post("/abort_request", json=named).json() == {"aborted": 1}
        asking.join(10)
        assert not engine.running and not asking.is_alive()
        (answer,) = answers
        found = answer["meta_info"] if route == "/generate" else answer["choices"][0]
        reason = found["finish_reason"]
        assert "abort" in (reason, reason["type"] if isinstance(reason, dict) else None)


def test_parsers(serve):
    http = serve().http
    call = "<tool_call>f<arg_key>a</arg_key><arg_value>5</arg_value></tool_call>"
    told = http.post("/parse_function_call", json={"text": f"Well. {call}", "tools": [TOOL]}).json()
    assert told == {"normal_text": "Well.", "calls": [{"name": "f", "parameters": '{"a": 5}'}]}
    told = http.post("/separate_reasoning", json={"text": "hm</think>so", "reasoning_parser": "glm45"}).json()
    assert told == {"reasoning_text": "hm", "text": "so"}


def test_whether_a_token_can_be_made(serve, fake_engine, monkeypatch):
    engine = fake_engine()
    served = serve(engine)
    assert served.http.get("/health_generate").json() == {"status": "ok"}
    assert engine.params[-1].max_tokens == 1

    def fail():
        raise ValueError("no luck")

    engine.before_step = fail
    answer = served.http.get("/health_generate")
    assert answer.status_code == 503 and "no luck" in answer.json()["message"]
    monkeypatch.setattr("hetero_glm5.server.native.PROBE_SECONDS", 0.05)
    engine.before_step = lambda: time.sleep(0.3)
    answer = served.http.get("/health_generate")
    assert answer.status_code == 503 and answer.json()["status"] == "busy"
