"""The packaged model behind the HTTP API: what the official openai client can ask for, and the engine then does."""

import json
import math

import jsonschema
import openai
import pytest

ASK = {"model": "tiny", "max_tokens": 24, "temperature": 0}
HI = [{"role": "user", "content": "What is 12 + 30?"}]
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}, "even": {"type": "boolean"}},
    "required": ["sum", "even"],
    "additionalProperties": False,
}


def tool(name: str) -> dict:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": "Tells.", "parameters": parameters}}


TOOLS = [tool("get_weather"), tool("get_time")]


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_several_answers(client):
    story = [{"role": "user", "content": "Tell me a story about a dog."}]
    ask = {**ASK, "messages": story, "temperature": 2, "seed": 5, "n": 3, "max_tokens": 12}
    whole = client.chat.completions.create(**ask)
    texts = [choice.message.reasoning_content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) > 1
    one = client.chat.completions.create(**{**ask, "n": 1})
    assert one.choices[0].message.reasoning_content == texts[0]
    assert whole.usage.prompt_tokens == one.usage.prompt_tokens, "the prompt counts once"
    assert whole.usage.prompt_tokens_details.cached_tokens < whole.usage.prompt_tokens
    streamed, usage = [""] * 3, None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += getattr(choice.delta, "reasoning_content", None) or ""
    assert streamed == texts and usage.completion_tokens == whole.usage.completion_tokens == 36


def test_biases_and_penalties_decide(client, tokenizer):
    (token,) = tokenizer.encode("7")
    biased = client.completions.create(**ASK, prompt="A number:", logit_bias={str(token): 100})
    assert biased.choices[0].text == "7" * 24
    both = {"presence_penalty": 2, "frequency_penalty": 2}
    varied = client.completions.create(**ASK, prompt="A number:", logit_bias={str(token): 20}, **both)
    assert set(varied.choices[0].text) != {"7"}
    extra = {"min_p": 1.0, "repetition_penalty": 1.0}
    certain = client.completions.create(**{**ASK, "temperature": 1, "seed": 1}, prompt="A number:", extra_body=extra)
    assert certain.choices[0].text == client.completions.create(**ASK, prompt="A number:").choices[0].text


def test_logprobs_of_a_chat_streamed_and_not(client):
    ask = {**ASK, "messages": HI, "logprobs": True, "top_logprobs": 3, "stop": ["zzz", "42"], "max_tokens": 200}
    (choice,) = client.chat.completions.create(**ask, extra_body=PLAIN).choices
    content = choice.logprobs.content
    assert content and all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in content)
    assert all(one.token == one.top_logprobs[0].token for one in content), "greedy"
    spelled = b"".join(bytes(one.bytes) for one in content).decode()
    assert spelled.startswith(choice.message.content), "and what ended it"
    shown, told = "", []
    for chunk in client.chat.completions.create(**ask, stream=True, extra_body=PLAIN):
        shown += chunk.choices[0].delta.content or ""
        told += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
        assert len("".join(one.token for one in told)) <= len(shown) or chunk.choices[0].finish_reason
    assert shown == choice.message.content and [one.token for one in told] == [one.token for one in content]


def test_what_lm_eval_asks_for(client, tokenizer):
    """Log-likelihoods of continuations: prompts as token ids, echo, one token more."""
    texts = ["The sum of 12 and 30 is 42.", "Paris is the capital of France, and"]
    prompts = [tokenizer.encode(text) for text in texts]
    ask = {**ASK, "prompt": prompts, "logprobs": 1, "max_tokens": 1, "echo": True, "seed": 1234}
    answer = client.completions.create(**ask)
    for choice, prompt, text in zip(answer.choices, prompts, texts, strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(prompt) + 1
        assert told.token_logprobs[0] is None and all(value <= 0 for value in told.token_logprobs[1:])
        assert choice.text.startswith(text) and told.text_offset[len(prompt)] == len(text)
        assert told.text_offset[0] == 0 and text[told.text_offset[3] :].startswith(told.tokens[3])
        for token, value, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True))[1:]:
            assert top[token] == value and len(top) <= 2
    alone = client.completions.create(**{**ASK, "max_tokens": 0}, prompt=texts[0], echo=True, logprobs=1)
    (choice,) = alone.choices
    assert choice.text == texts[0] and alone.usage.completion_tokens == 0
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(
        answer.choices[0].logprobs.token_logprobs[1:-1], abs=1e-4
    )
    streamed = client.completions.create(**{**ask, "prompt": prompts[0]}, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_logprobs_belong_to_the_tokens_drawn(client):
    """The chance of a continuation is that of its tokens as a prompt."""
    made = client.completions.create(**ASK, prompt="Once upon a time", logprobs=0)
    told = made.choices[0].logprobs
    read = client.completions.create(
        **{**ASK, "max_tokens": 0}, prompt="Once upon a time" + made.choices[0].text, echo=True, logprobs=0
    )
    assert made.choices[0].finish_reason == "length" and len(told.tokens) == 24
    assert read.choices[0].logprobs.tokens[-24:] == told.tokens
    assert read.choices[0].logprobs.token_logprobs[-24:] == pytest.approx(told.token_logprobs, abs=1e-3)
    assert [len(top) for top in told.top_logprobs] == [1] * 24


def test_prefixes_are_shared_within_a_salt_only(client):
    def cached(prompt: str, salt: str | None) -> int:
        usage = client.completions.create(**ASK, prompt=prompt, extra_body={"cache_salt": salt}).usage
        return usage.prompt_tokens_details.cached_tokens

    prompt = "A story that nobody has told before: " * 4
    assert cached(prompt, "a") == cached(prompt, "b") == 0
    assert cached(prompt, "a") > 30 and cached(prompt, "b") > 30 and cached(prompt, None) < 5


def test_json_that_keeps_to_its_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA, "strict": True}}
    for extra in (PLAIN, {}):
        ask = {**ASK, "messages": HI, "response_format": form, "max_tokens": 400, "extra_body": extra}
        whole = client.chat.completions.create(**ask).choices[0]
        assert whole.finish_reason == "stop" and hasattr(whole.message, "reasoning_content") is not bool(extra)
        jsonschema.validate(json.loads(whole.message.content), SCHEMA)
    streamed = client.chat.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole.message.content


def test_calls_that_must_be_made(client):
    ask = {**ASK, "messages": HI, "tools": TOOLS, "max_tokens": 300}
    for choice, names in (
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
    ):
        made = client.chat.completions.create(**ask, tool_choice=choice, parallel_tool_calls=False).choices[0]
        (call,) = made.message.tool_calls
        assert made.finish_reason == "tool_calls" and call.function.name in names
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    deltas = [
        call
        for chunk in client.chat.completions.create(**ask, tool_choice=choice, parallel_tool_calls=False, stream=True)
        for call in chunk.choices[0].delta.tool_calls or ()
    ]
    assert deltas[0].function.name == "get_time"
    assert "".join(call.function.arguments for call in deltas) == call.function.arguments


@pytest.mark.parametrize(
    "extra, fits",
    [
        ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}}, lambda text: len(text) == 6 and text[3] == "-"),
        ({"guided_grammar": 'start: "<" /[0-9]{4}/ ">"'}, lambda text: text[0] + text[-1] == "<>" and len(text) == 6),
        ({"guided_json": SCHEMA}, lambda text: set(json.loads(text)) == {"sum", "even"}),
    ],
)
def test_vllms_names(client, extra, fits):
    choice = client.completions.create(**{**ASK, "max_tokens": 200}, prompt="Well:", extra_body=extra).choices[0]
    assert choice.finish_reason == "stop" and fits(choice.text)


def test_a_schema_that_cannot_be_compiled_is_a_400(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strng"}}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="cannot be used as a grammar") as caught:
            client.chat.completions.create(**ASK, messages=HI, response_format=form, stream=stream)
        assert caught.value.param == "response_format"


def test_timings_and_the_request_id(client, served):
    answer = client.completions.with_raw_response.create(
        **ASK, prompt="One, two", extra_headers={"X-Request-Id": "an-id"}, extra_body={"ignore_eos": True}
    )
    assert answer.headers["x-request-id"] == "an-id"
    times, usage = answer.parse().timings, answer.parse().usage
    assert times["predicted_n"] == usage.completion_tokens == 24
    assert times["cache_n"] + times["prompt_n"] == usage.prompt_tokens
    assert times["prompt_ms"] > 0 and math.isclose(times["predicted_per_second"] * times["predicted_per_token_ms"], 1e3)
    chunks = served.chunks("/v1/completions", **ASK, prompt="Once upon", stream_options={"include_usage": True})
    assert json.loads(chunks[-2])["timings"]["predicted_n"] == 24
