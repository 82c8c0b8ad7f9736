"""The packaged model behind SGLang's and vLLM's own routes, and what the server tells of itself."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

PARAMS = {"max_new_tokens": 8, "temperature": 0}


def generate(served, **body):
    answer = served.http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_generate(served, tokenizer):
    text = "Once upon a time"
    whole = generate(served, text=text, sampling_params=PARAMS)
    assert tokenizer.decode(whole["output_ids"]) == whole["text"] and len(whole["output_ids"]) == 8
    openai = {"model": "tiny", "prompt": text, "max_tokens": 8, "temperature": 0}
    assert whole["text"] == served.http.post("/v1/completions", json=openai).json()["choices"][0]["text"]
    same = generate(served, input_ids=tokenizer.encode(text), sampling_params=PARAMS)
    assert same["text"] == whole["text"] and same["meta_info"]["cached_tokens"] > 0
    chunks = [json.loads(c) for c in served.chunks("/generate", text=text, sampling_params=PARAMS)[:-1]]
    assert chunks[-1]["text"] == whole["text"] and chunks[-1]["output_ids"] == whole["output_ids"]
    for stop, matched in (
        ({"stop": whole["text"][3:6]}, whole["text"][3:6]),
        ({"stop_token_ids": [whole["output_ids"][4]]}, whole["output_ids"][4]),
    ):
        ended = generate(served, text=text, sampling_params={**PARAMS, **stop})
        assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}
    number = generate(served, text=text, sampling_params={**PARAMS, "regex": "[0-9]{3}"})
    assert number["text"].isdigit()


def test_generate_with_logprobs(served, tokenizer):
    text = "The sum of 12 and 30 is"
    tokens = tokenizer.encode(text)
    asked = {"return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    meta = generate(served, text=text, sampling_params=PARAMS, logprob_start_len=0, **asked)["meta_info"]
    values, ids, texts = zip(*meta["input_token_logprobs"], strict=True)
    assert list(ids) == tokens and "".join(texts) == text and values[0] is None and max(values[1:]) <= 0
    assert [len(top or ()) for top in meta["input_top_logprobs"]] == [0] + [2] * (len(tokens) - 1)
    for (value, token, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert top[0][:2] == [value, token], "greedy"
    later = generate(served, text=text, sampling_params=PARAMS, logprob_start_len=3, **asked)["meta_info"]
    assert [one[1] for one in later["input_token_logprobs"]] == tokens[3:] and later["input_token_logprobs"][0][
        0
    ] is None
    assert [one[0] for one in later["input_token_logprobs"][1:]] == pytest.approx(values[4:], abs=1e-4)
    last = generate(served, text=text, sampling_params=PARAMS, **asked)["meta_info"]
    assert [one[:2] for one in last["input_token_logprobs"]] == [[None, tokens[-1]]]
    silent = generate(served, text=text, sampling_params={"max_new_tokens": 0}, logprob_start_len=0, **asked)
    assert silent["output_ids"] == [] and silent["meta_info"]["completion_tokens"] == 0
    assert [one[0] for one in silent["meta_info"]["input_token_logprobs"][1:]] == pytest.approx(values[1:], abs=1e-4)


def test_what_the_server_tells_of_itself(served):
    generate(served, text="Once upon a time", sampling_params=PARAMS)
    info = served.http.get("/get_server_info").json()
    assert info == served.http.get("/server_info").json() | {"internal_states": info["internal_states"]}
    assert (info["device"], info["dtype"], info["max_total_num_tokens"]) == ("cpu", "float32", 4096)
    assert info["kt_method"] == "FP32" and info["api_key"] is None and "KV pool" in " ".join(info["memory_plan"])
    (state,) = info["internal_states"]
    assert state["counts"]["prompt_tokens"] > 0 and state["num_pages"] == 64 and len(state["draft_acceptance"]) == 3
    assert state["num_used_pages"] == state["num_running_reqs"] == 0
    model = served.http.get("/get_model_info").json()
    assert model["is_generation"] and model["context_length"] == 4096
    assert served.http.get("/health_generate").json() == {"status": "ok"}


def test_metrics_count(served):
    def read():
        text = served.http.get("/metrics").text
        return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}

    before = read()
    count = generate(served, text="A text of its own, here", sampling_params=PARAMS)["meta_info"]["prompt_tokens"]
    after = read()

    def grown(name: str) -> float:
        return after[f"hetero_glm5:{name}"] - before[f"hetero_glm5:{name}"]

    assert grown("generation_tokens_total") == 8 and grown("prompt_tokens_total") == count
    assert grown("cached_tokens_total") + grown("prefilled_tokens_total") == count
    assert grown("time_to_first_token_seconds_count") == 1 and grown("inter_token_latency_seconds_count") == 7
    assert after["hetero_glm5:num_running_reqs"] == 0 and 0 <= after["hetero_glm5:token_usage"] <= 1
    assert after["hetero_glm5:spec_accept_length"] >= 1
    assert grown("host_experts_bytes_total") > 0 and after["hetero_glm5:host_experts_gb_per_s"] > 0


def test_flushing_the_cache(served):
    text = "A prompt that is told three times, word for word, and is long enough to tell."

    def cached() -> int:
        return generate(served, text=text, sampling_params=PARAMS)["meta_info"]["cached_tokens"]

    assert cached() < cached()
    assert served.http.post("/flush_cache").json()["success"]
    assert cached() == 0


@pytest.mark.parametrize("route", ["/v1/embeddings", "/v1/rerank", "/v1/audio/speech", "/v1/images/generations"])
def test_what_there_is_not(served, route):
    answer = served.http.post(route, json={"input": "a"})
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "invalid_request_error"
