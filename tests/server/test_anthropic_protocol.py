"""Anthropic's requests as conversations in OpenAI's form."""

import json

import pytest

from hetero_glm5.core import RequestError, SamplingParams
from hetero_glm5.server.anthropic_protocol import CountRequest, MessagesRequest
from hetero_glm5.server.protocol import parse_request
from hetero_glm5.server.tokenizer import SamplingDefaults

USER = {"role": "user", "content": "Hi"}


def read(*messages, **fields) -> MessagesRequest:
    body = {"model": "m", "max_tokens": 9, "messages": messages or [USER], **fields}
    return parse_request(MessagesRequest, json.dumps(body).encode())


def plain(*messages, **fields) -> list[dict]:
    return read(*messages, **fields).asked(SamplingParams()).messages


def text(value: str, **more) -> dict:
    return {"type": "text", "text": value, **more}


def result(content, **more) -> dict:
    return {"type": "tool_result", "tool_use_id": "t1", "content": content, **more}


def test_systems_are_one_message():
    assert plain(system="Be brief.") == [{"role": "system", "content": "Be brief."}, USER]
    blocks = [text("You code."), text("Be brief.", cache_control={"type": "ephemeral"})]
    assert plain(system=blocks)[0] == {"role": "system", "content": "You code.\nBe brief."}
    assert plain(USER, {"role": "system", "content": "Now."}, USER)[1] == {"role": "system", "content": "Now."}


def test_neighbouring_texts_are_one_message_between_results():
    """Joined one by one, these would take minutes."""
    many = [text("a" * 300)] * 100_000
    told = plain({"role": "user", "content": [*many, result("x"), result("y"), text("b"), text("c")]})
    assert [message["role"] for message in told] == ["user", "tool", "tool", "user"]
    assert told[0]["content"] == "a" * 30_000_000 and told[-1]["content"] == "bc"


def test_an_assistants_blocks_are_one_message():
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "x"},
        {"type": "redacted_thinking", "data": "x"},
        text("I look. "),
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}, "cache_control": {"type": "ephemeral"}},
        text("And then."),
    ]
    assert plain(USER, {"role": "assistant", "content": blocks}, USER)[1] == {
        "role": "assistant",
        "content": "I look. And then.",
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    }


def test_tool_results_are_messages_of_their_own():
    blocks = [
        result("1"),
        result([text("2"), text("3")]),
        result("", is_error=True),
        text("a"),
        text("b"),
        result(None),
    ]
    tool = {"role": "tool", "tool_call_id": "t1"}
    assert plain({"role": "user", "content": blocks}) == [
        {**tool, "content": "1"},
        {**tool, "content": "23"},
        {**tool, "content": "Error: "},
        {"role": "user", "content": "ab"},
        {**tool, "content": ""},
    ]


def test_tools_and_choices():
    tools = [
        {"name": "f", "description": "d", "input_schema": {"type": "object"}, "cache_control": None, "strict": True},
        {"type": "custom", "name": "g", "input_schema": {}},
        {"type": "web_search_20250305", "name": "web_search"},
    ]
    asked = read(tools=tools, tool_choice={"type": "tool", "name": "g", "disable_parallel_tool_use": True})
    asked = asked.asked(SamplingParams())
    assert [tool["function"] for tool in asked.tools] == [
        {"name": "f", "description": "d", "parameters": {"type": "object"}},
        {"name": "g", "parameters": {}},
    ]
    assert (asked.choice, asked.function, asked.parallel) == ("only", "g", False)
    with pytest.raises(RequestError, match="'h', which is not among the tools"):
        read(tools=tools, tool_choice={"type": "tool", "name": "h"}).asked(SamplingParams()).grammar(thinking=True)


def test_what_changes_nothing_is_accepted():
    everything = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "thinking": {"type": "enabled", "budget_tokens": 31999, "display": "omitted"},
        "mcp_servers": [],
        "container": None,
        "system": None,
        "tool_choice": None,
        "tools": None,
    }
    asked = read({"role": "user", "content": [text("Hi", cache_control={"type": "ephemeral"})]}, **everything)
    assert asked.asked(SamplingParams()).messages == [USER]
    assert asked.sampling(SamplingDefaults(temperature=0.7, top_k=5)) == SamplingParams(
        max_tokens=9, temperature=0.7, top_k=5
    )


def test_a_picture_in_a_tools_result_is_left_out():
    """It comes again with each turn: a refusal would end the conversation."""
    call = {"type": "tool_use", "id": "t1", "name": "read", "input": {}}
    shows = result([{"type": "image", "source": {}}, {"type": "text", "text": " and words"}])
    turns = [USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": [shows]}]
    told = read(messages=turns).asked(SamplingParams()).messages[-1]
    assert told["content"] == "[image left out: this model reads text only] and words"


def test_effort_reaches_the_template():
    asked = read(thinking={"type": "adaptive"}, output_config={"effort": "high"}).asked(SamplingParams())
    assert asked.template == {"enable_thinking": True, "reasoning_effort": "high"}


@pytest.mark.parametrize(
    "messages, fields, param, sentence",
    [
        (
            [{"role": "user", "content": [{"type": "image", "source": {}}]}],
            {},
            "messages",
            "'image' at [0]; only text,",
        ),
        ([{"role": "user", "content": [{"type": "document"}]}], {}, "messages", "'document'"),
        (
            [{"role": "user", "content": [result([{"type": "video"}])]}],
            {},
            "messages",
            "tool_result at [0] whose content",
        ),
        ([{"role": "assistant", "content": [{"type": "server_tool_use"}]}, USER], {}, "messages", "'server_tool_use'"),
        ([{"role": "assistant", "content": [result("1")]}, USER], {}, "messages", "'tool_result'"),
        (
            [{"role": "assistant", "content": [{"type": "tool_use", "id": "t"}]}, USER],
            {},
            "messages",
            "name is missing",
        ),
        ([{"role": "robot", "content": "a"}], {}, "messages", "messages[0].role is wrong"),
        ([{"role": "user", "content": 5}], {}, "messages", "messages[0].content must be a string"),
        ([USER, {"role": "assistant", "content": "The answer is"}], {}, "messages", "answers are not continued"),
        ([USER], {"system": [{"type": "image"}]}, "system", "'image'"),
        ([USER], {"tools": [{"name": "f"}]}, "tools", "input_schema"),
        ([USER], {"tool_choice": {"type": "some"}}, "tool_choice", "tool_choice.type"),
        ([USER], {"stop_sequences": [""]}, "stop_sequences", "stop_sequences[0]"),
        ([USER], {"container": "c"}, "container", "container is not supported"),
        ([USER], {"max_tokens": "9"}, "max_tokens", "max_tokens"),
    ],
)
def test_what_cannot_be_honoured_is_named(messages, fields, param, sentence):
    with pytest.raises(RequestError) as refused:
        plain(*messages, **fields)
    assert refused.value.param == param and sentence in str(refused.value)


def test_counting_needs_no_max_tokens():
    body = {"messages": [USER], "stream": True, "stop_sequences": 5}
    assert parse_request(CountRequest, json.dumps(body).encode()).asked(SamplingParams()).messages == [USER]
