"""The packaged model through the clients of agents: anthropic's, and openai's Responses."""

import json
import os
import re
import subprocess
import sys

import anthropic
import openai
import pytest
from pydantic import BaseModel

from hetero_glm5.model_config import DEMO_FOLDER

pytestmark = pytest.mark.skipif(not DEMO_FOLDER.exists(), reason="the package was built without the demo model")

FLAGS = "--model demo --device cpu --port 0 --reasoning-parser glm45 --tool-call-parser glm47 --dtype float32"
FLAGS += " --kt-method FP32 --kv-cache-dtype float32 --max-total-tokens 8192"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "The city"}},
    "required": ["city"],
}
ABOUT = {"name": "get_weather", "description": "Get the current weather of a city."}
WEATHER = "What is the weather in Paris?"


@pytest.fixture(scope="module")
def url():
    command = [sys.executable, "-m", "hetero_glm5.launch_server", *FLAGS.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    yield re.search(r"demo is ready at (http://\S+)", server.stdout.readline())[1]
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def claude(url):
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def responses(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60).responses


def messages(*turns) -> dict:
    roles = ["user", "assistant"] * len(turns)
    return {
        "model": "demo",
        "max_tokens": 256,
        "messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "extra_body": {"temperature": 0},
    }


def test_a_message_that_thinks(claude):
    ask = messages("What is 27 + 45?")
    whole = claude.messages.create(**ask)
    thinking, text = whole.content
    assert thinking.type == "thinking" and thinking.thinking and "72" in text.text
    assert whole.stop_reason == "end_turn" and whole.usage.output_tokens > 5
    with claude.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text"]
    assert (streamed.content[0], streamed.content[1].text) == (thinking, text.text)
    cached, computed = streamed.usage.cache_read_input_tokens, streamed.usage.input_tokens
    assert cached > 0 and cached + computed == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def test_a_stop_sequence_ends_a_message(claude):
    ask = {**messages("What is 27 + 45?"), "thinking": {"type": "disabled"}}
    text = claude.messages.create(**ask).content[0].text
    stopped = claude.messages.create(**ask, stop_sequences=["@@", text[2:5]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[2:5])
    assert "".join(block.text for block in stopped.content) == text[: text.index(text[2:5])]


def test_a_tool_is_called_and_its_result_continues_the_prompt(claude):
    tools = [{**ABOUT, "input_schema": SCHEMA}]
    first = claude.messages.create(**messages(WEATHER), tools=tools)
    call = first.content[-1]
    assert first.stop_reason == "tool_use" and (call.name, call.input) == ("get_weather", {"city": "Paris"})
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": '{"temperature": 21}'}]
    ask = messages(WEATHER, first.content, results)
    counted = claude.messages.count_tokens(
        **{name: ask[name] for name in ("model", "messages", "thinking")}, tools=tools
    )
    second = claude.messages.create(**ask, tools=tools)
    assert second.usage.input_tokens + second.usage.cache_read_input_tokens == counted.input_tokens
    before = first.usage.input_tokens + first.usage.cache_read_input_tokens + first.usage.output_tokens
    assert second.usage.cache_read_input_tokens >= before - 1, "the call came back as it was sampled"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_can_be_made_sure_of(claude, choice):
    tools = [{**ABOUT, "input_schema": SCHEMA}]
    choice = {**choice, "disable_parallel_tool_use": True}
    message = claude.messages.create(**messages("Hello, how are you?"), tools=tools, tool_choice=choice)
    assert message.stop_reason == "tool_use" and set(message.content[-1].input) == {"city"}


def test_responses_with_a_tool(responses):
    tools = [{"type": "function", **ABOUT, "parameters": SCHEMA}]
    ask = {"model": "demo", "tools": tools, "temperature": 0, "max_output_tokens": 256}
    first = responses.create(**ask, input=WEATHER)
    call = first.output[-1]
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Paris"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"temperature": 21}'}
    by_id = responses.create(**ask, input=[output], previous_response_id=first.id)
    by_hand = [{"role": "user", "content": WEATHER}, *first.output, output]
    with responses.stream(**ask, input=by_hand) as stream:
        streamed = stream.get_final_response()
    assert streamed.output_text == by_id.output_text and streamed.usage.input_tokens == by_id.usage.input_tokens
    assert by_id.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1


class Sum(BaseModel):
    result: int


def test_responses_with_structured_output(responses):
    parsed = responses.parse(
        model="demo", input="What is 27 + 45?", text_format=Sum, max_output_tokens=256, temperature=0
    )
    assert parsed.status == "completed" and isinstance(parsed.output_parsed, Sum)
