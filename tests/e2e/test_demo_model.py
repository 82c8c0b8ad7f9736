"""The packaged model: through the openai client, and what is claimed of its quality."""

import json
import os
import re
import subprocess
import sys
from itertools import chain

import openai
import pytest

from hetero_glm5.model_config import DEMO_FOLDER
from hetero_glm5.quality.report import Options, measure

pytestmark = pytest.mark.skipif(not DEMO_FOLDER.exists(), reason="the package was built without the demo model")

FLAGS = {
    "--model": "demo",
    "--device": "cpu",
    "--port": "0",
    "--reasoning-parser": "glm45",
    "--tool-call-parser": "glm47",
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city"}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def client():
    command = [sys.executable, "-m", "hetero_glm5.launch_server", *chain(*FLAGS.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    url = re.search(r"demo is ready at (http://\S+)", server.stdout.readline())[1]
    yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    server.kill()
    server.wait()


def answer(client, text, **ask):
    messages = [{"role": "user", "content": text}]
    made = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=256, **ask)
    return made.choices[0]


def test_a_sum(client):
    choice = answer(client, "What is 27 + 45?")
    assert choice.finish_reason == "stop" and "72" in choice.message.content
    assert choice.message.reasoning_content and "<" not in choice.message.content


def test_a_tool_call(client):
    choice = answer(client, "What is the weather in Paris?", tools=[WEATHER])
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})


@pytest.mark.slow
def test_what_is_claimed_of_it():
    methods = ("FP32", "BF16", "FP8", "INT8", "INT4")
    found = measure(str(DEMO_FOLDER), Options(methods, count=40, seed=1, quick=False), print)
    ratios = {method: row["ratio"] for method, row in found["perplexity"].items()}
    assert abs(ratios["INT8"] - 1) <= 0.005 and abs(ratios["FP8"] - 1) <= 0.01 and abs(ratios["INT4"] - 1) <= 0.03
    assert abs(found["sparse"]["all"]["ratio"] - 1) <= 0.03
    for method, answers in found["answers"].items():
        shares = {task: marks["right"] / marks["asked"] for task, marks in answers.items()}
        assert shares["sums"] >= 0.95 and shares["project"] >= 0.95 and shares["chats"] >= 0.8, method
        assert shares["recall 2048"] >= 0.8, method  # of 10
        assert shares["tools: calls"] >= 0.9, method  # of 30; of 1,206 0.96 are right
    assert found["drafting"]["all"]["shares"][0] >= 0.7
