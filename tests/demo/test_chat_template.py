"""The template against GLM-5's rules, rendered by transformers as a user of the checkpoint would."""

from __future__ import annotations

import pytest
from tiny import tiny_checkpoint

START = "[gMASK]<sop>"
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "description": "天气", "parameters": {"type": "object"}}}
TOOL_JSON = '{"type": "function", "function": {"name": "f", "description": "天气", "parameters": {"type": "object"}}}'


@pytest.fixture(scope="module")
def render(checkpoints):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint(checkpoints))

    def apply(messages, tools=None, add_generation_prompt=True, **kwargs):
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
        )

    return apply


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_user_turn_opens_thinking(render):
    assert render([USER]) == START + "<|user|>Hi<|assistant|><think>"
    assert render([USER], enable_thinking=True) == START + "<|user|>Hi<|assistant|><think>"
    assert render([USER], enable_thinking=False) == START + "<|user|>Hi<|assistant|></think>"
    assert render([USER], add_generation_prompt=False) == START + "<|user|>Hi"


def test_no_newline_is_added_or_taken(render):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi\n"}]
    assert render(messages) == START + "<|system|>Be brief.<|user|> Hi\n<|assistant|><think>"


def test_content_parts_are_joined(render):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render([{"role": "user", "content": parts}]) == START + "<|user|>ab<|assistant|><think>"


def test_old_reasoning_is_dropped_unless_kept(render):
    turn = [USER, assistant(" 2 ", reasoning_content=" easy\n"), {"role": "user", "content": "more"}]
    dropped = START + "<|user|>Hi<|assistant|></think>2<|user|>more<|assistant|><think>"
    kept = START + "<|user|>Hi<|assistant|><think>easy</think>2<|user|>more<|assistant|><think>"
    assert render(turn) == render(turn, clear_thinking=True) == dropped
    assert render(turn, clear_thinking=False) == kept


def test_reasoning_inside_content(render):
    turn = [USER, assistant("<think>\neasy\n</think>\n2\n"), {"role": "user", "content": "more"}]
    kept = START + "<|user|>Hi<|assistant|><think>easy</think>2<|user|>more<|assistant|><think>"
    assert render(turn, clear_thinking=False) == kept
    assert render([USER, assistant("x")], add_generation_prompt=False) == START + "<|user|>Hi<|assistant|></think>x"


def test_reasoning_after_the_last_user_message_stays(render):
    turns = [
        USER,
        assistant(
            "", reasoning_content="look", tool_calls=[call("f", {"city": "Köln", "n": 3, "o": {"a": [1, None]}})]
        ),
        {"role": "tool", "content": "21"},
        {"role": "tool", "content": "22"},
        assistant(None, reasoning_content="again", tool_calls=[call("g", {}), call("h", {"t": True})]),
        {"role": "tool", "content": "ok"},
    ]
    assert render(turns) == START + (
        "<|user|>Hi<|assistant|><think>look</think><tool_call>f<arg_key>city</arg_key><arg_value>Köln</arg_value>"
        '<arg_key>n</arg_key><arg_value>3</arg_value><arg_key>o</arg_key><arg_value>{"a": [1, null]}</arg_value>'
        "</tool_call><|observation|><tool_response>21</tool_response><tool_response>22</tool_response>"
        "<|assistant|><think>again</think><tool_call>g</tool_call>"
        "<tool_call>h<arg_key>t</arg_key><arg_value>true</arg_value></tool_call>"
        "<|observation|><tool_response>ok</tool_response><|assistant|><think>"
    )


def test_tools_come_first_one_json_a_line(render):
    prompt = render([{"role": "system", "content": "S"}, USER], tools=[TOOL, TOOL])
    assert prompt == START + (
        "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{TOOL_JSON}\n{TOOL_JSON}\n</tools>\n\n"
        "For each function call, output the function name and arguments within the following XML format:\n"
        "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
        "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
        "<|system|>S<|user|>Hi<|assistant|><think>"
    )
