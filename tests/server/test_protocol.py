"""Requests: what is accepted, and the sentence for what is not."""

import json

import pytest

from hetero_glm5.core import RequestError
from hetero_glm5.server.openresponses_protocol import ResponsesRequest
from hetero_glm5.server.protocol import ChatRequest, CompletionRequest, parse_request
from hetero_glm5.server.tokenizer import SamplingDefaults

HI = {"messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}


def named(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


def deep(levels: int) -> list:
    return [deep(levels - 1)] if levels else []


def chat(**fields) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps({**HI, **fields}).encode())


def completion(**fields) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps(fields).encode())


@pytest.mark.parametrize(
    "prompt, want",
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_prompts(prompt, want):
    assert completion(prompt=prompt).prompt == want


@pytest.mark.parametrize("prompt", [None, 5, [], [1, "a"], [[1], "a"], [-1], [True], [[1.5]]])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(RequestError, match="prompt must be a string, a list of strings") as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


def test_sampling_takes_the_checkpoints_defaults_unless_told():
    defaults = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)
    plain = chat().sampling(defaults)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.stop_token_ids) == (0.6, 0.95, 20, ())
    asked = chat(
        temperature=0, top_p=1, top_k=-1, seed=5, stop="END", stop_token_ids=[4], ignore_eos=True, min_tokens=2,
        max_tokens=3, max_completion_tokens=8,
    ).sampling(defaults)  # fmt: skip
    assert (asked.temperature, asked.top_p, asked.top_k, asked.seed) == (0, 1, 0, 5)
    assert (asked.stop, asked.stop_token_ids, asked.min_tokens, asked.max_tokens) == (("END",), (4,), 2, 8)
    assert asked.ignore_eos


def test_every_sampling_field_reaches_the_engine():
    told = {"n": 3, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1}
    params = chat(**told, logit_bias={"7": -100, "8": 2.5}, logprobs=True, top_logprobs=5).sampling(SamplingDefaults())
    assert {name: getattr(params, name) for name in told} == told
    assert params.logit_bias == {7: -100, 8: 2.5} and (params.logprobs, params.prompt_logprobs) == (5, None)
    assert chat(logprobs=True).sampling(SamplingDefaults()).logprobs == 0
    settled = SamplingDefaults(min_p=0.2, repetition_penalty=1.2)
    assert (chat().sampling(settled).min_p, chat(min_p=0).sampling(settled).min_p) == (0.2, 0)
    assert chat(repetition_penalty=None).sampling(settled).repetition_penalty == 1.2
    asked = chat(cache_salt="s", rid="a", request_id="b")
    assert (asked.cache_salt, asked.names) == ("s", {"a", "b"})


@pytest.mark.parametrize(
    "fields, logprobs, prompt_logprobs, max_tokens, silent",
    [
        ({"logprobs": 1, "echo": True, "max_tokens": 1}, 1, 1, 1, False),
        ({"logprobs": 0, "echo": True, "max_tokens": 0}, 0, 0, 1, True),
        ({"logprobs": 3}, 3, None, None, False),
        ({"echo": True}, None, None, None, False),
    ],
)
def test_scoring_a_prompt(fields, logprobs, prompt_logprobs, max_tokens, silent):
    asked = completion(prompt="a", **fields)
    params = asked.sampling(SamplingDefaults())
    assert (params.logprobs, params.prompt_logprobs, params.max_tokens) == (logprobs, prompt_logprobs, max_tokens)
    assert asked.silent is silent


def test_no_tokens_without_echo_is_refused():
    with pytest.raises(RequestError, match="max_tokens is 0"):
        completion(prompt="a", max_tokens=0).sampling(SamplingDefaults())


def test_a_call_that_must_be_made_is_a_grammar():
    def text(**fields):
        grammar = chat(tools=[TOOL, {**TOOL, "function": {"name": "g"}}], **fields).grammar()
        return grammar and grammar.text

    assert text() is None and text(tool_choice="none") is None and text(parallel_tool_calls=False) is None
    assert 'f0: "f"' in text(tool_choice="required") and 'f1: "g"' in text(tool_choice="required")
    assert 'f0: "g"' in text(tool_choice=named("g")) and '"f"' not in text(tool_choice=named("g"))
    assert "answer: call+" in text(tool_choice="required")
    assert "answer: call\n" in text(tool_choice="required", parallel_tool_calls=False)
    either = text(response_format={"type": "json_object"})
    assert "answer: content | call+" in either and "content: %json" in either


def test_fields_that_change_nothing_are_accepted():
    chat(user="me", metadata={"a": "b"}, store=False, n=1, logprobs=False, presence_penalty=0, frequency_penalty=0.0)
    chat(response_format={"type": "text"}, logit_bias={}, tool_choice="none", parallel_tool_calls=True, stop=None)
    chat(tools=None, stream=None, temperature=None, stream_options=None, tool_choice=None)


@pytest.mark.parametrize(
    "fields, param, sentence",
    [
        ({"n": 65}, "n", r"n is 65; it must be between 1 and 64"),
        ({"n": 0}, "n", "n is 0"),
        ({"best_of": 2}, "best_of", r"best_of is not supported by this server \(only 1 is\)\."),
        ({"logprobs": 1}, "logprobs", "should be a valid boolean"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs is 3, which needs logprobs to be true."),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "logprobs is 21; it must be between 0 and 20"),
        ({"logit_bias": {"x": 2}}, "logit_bias", "gives 'x' a number; its keys must be token ids"),
        ({"logit_bias": {"1": 200}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": [1]}, "logit_bias", "must be an object"),
        ({"presence_penalty": 3}, "presence_penalty", "between -2 and 2"),
        ({"min_p": 1.5}, "min_p", "between 0 and 1"),
        ({"cache_salt": 5}, "cache_salt", "valid string"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
        ({"response_format": {"type": "xml"}}, "response_format", "response_format is of type 'xml'; it must be"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens", "with a grammar"),
        ({"tool_choice": "any"}, "tool_choice", "tool_choice is 'any'; it must be auto, none, required or"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools to call"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "tool_choice is dict; it must be auto"),
        ({"tools": [TOOL], "tool_choice": named("g")}, "tool_choice", "tool_choice names 'g', which is not"),
        ({"colour": "red"}, "colour", "colour is not a field of this request."),
        ({"temperature": "hot"}, "temperature", "temperature is wrong: input should be a valid number"),
        ({"max_tokens": True}, "max_tokens", "should be a valid integer"),
        ({"max_tokens": 1.5}, "max_tokens", "should be a valid integer"),
        ({"stop": [1]}, "stop", "stop must be a string or a list of strings."),
        ({"tools": [{"type": "function"}]}, "tools", "tools must hold functions"),
        ({"stream_options": {"x": 1}}, "stream_options", "stream_options.x is not a field"),
        ({"messages": None}, "messages", "valid list"),
        ({"messages": [{"content": "x"}]}, "messages", r"messages\[0\].role is missing."),
        ({"messages": [{"role": "robot"}]}, "messages", r"messages\[0\].role is wrong"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            r"messages\[0\].content has a part of type 'image_url' at \[0\]; only",
        ),
        *(
            ({"messages": [{"role": "assistant", "tool_calls": calls}]}, "messages", r"\[0\].tool_calls must be a list")
            for calls in ([{}], 5, True, 1.5, "x", {"a": 1})
        ),
        ({"tool_choice": deep(150)}, "tool_choice", "tool_choice is list; it must be auto, none"),
        ({"messages": [{"role": "user", "content": [deep(150)]}]}, "messages", "a part of type NoneType"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": [1], "function": {"name": "f"}}]}]},
            "messages",
            r"messages\[0\].tool_calls has a call whose id is list; it must be a string",
        ),
        ({"guided_json": json.dumps({"enum": deep(250)})}, "guided_json", "a schema of more than 200 levels"),
        ({"stop": ["a"] * 2_000_000}, "stop", "stop has 2000000 strings; at most 64"),
    ],
)
def test_refusals_name_the_field(fields, param, sentence):
    with pytest.raises(RequestError, match=sentence) as caught:
        asked = chat(**fields)
        asked.sampling(SamplingDefaults(), asked.grammar())
    assert caught.value.param == param


@pytest.mark.parametrize("field", ["best_of", "suffix"])
def test_fields_of_old_completions_are_refused_by_name(field):
    with pytest.raises(RequestError, match=field):
        completion(prompt="a", **{field: 3})


@pytest.mark.parametrize(
    "body, sentence", [(b"", "no valid JSON"), (b'{"a":\n x}', "line 2 column 2"), (b"[]", "object")]
)
def test_bodies_that_are_no_json_object(body, sentence):
    with pytest.raises(RequestError, match=sentence):
        parse_request(ChatRequest, body)


def test_bodies_are_not_too_deep():
    chat(metadata={"a": deep(197)}, user="[" * 500)
    for levels in (198, 400, 900):
        with pytest.raises(RequestError, match="more than 200 levels"):
            chat(metadata={"a": deep(levels)})


def test_many_mistakes_are_one_refusal():
    """A sentence names the first; pydantic's own account of all of them would take gigabytes."""
    many = {f"a{i}": 0 for i in range(1_000_000)}
    for fields, name in (({"stream_options": many}, r"stream_options\.a0"), ({"gone": None, **many}, "a0")):
        with pytest.raises(RequestError, match=f"^{name} is not a field of this request"):
            chat(**fields)
    with pytest.raises(RequestError, match=r"include\[0\] is wrong: input should be a valid string"):
        parse_request(ResponsesRequest, json.dumps({"input": "x", "include": [0] * 1_000_000}).encode())


def test_tools_stay_as_they_came_and_other_types_are_skipped():
    function = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"b": 1, "a": 2}}}
    asked = chat(tools=[{"type": "web_search"}, function])
    assert asked.offered_tools == [function]
    assert chat(tools=[function], tool_choice="none").offered_tools is None
    assert chat(tools=[{"type": "web_search"}]).offered_tools is None


def test_messages_keep_only_what_templates_know():
    message = {"role": "assistant", "content": None, "refusal": None, "reasoning_content": "r", "audio": {}}
    assert chat(messages=[message]).plain_messages == [{"role": "assistant", "reasoning_content": "r"}]
    call = {"function": {"name": "f", "arguments": {"a": deep(150), "b": None}}}
    assert chat(messages=[{"role": "assistant", "tool_calls": [call]}]).plain_messages[0]["tool_calls"] == [call]


def test_reasoning_effort_reaches_the_template():
    asked = chat(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})
    assert asked.template_kwargs == {"reasoning_effort": "high", "enable_thinking": False}
