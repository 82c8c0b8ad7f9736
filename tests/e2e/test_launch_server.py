"""The server as a process, on a small random checkpoint, through the official openai client."""

import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest
from processes import COMMAND, IN_FP32, ONE_THREAD, Process

CARD_FLAGS = (  # the GLM-5 card's launch command, with numbers for this small machine
    "--kt-cpuinfer 2 --kt-threadpool-count 2 --kt-num-gpu-experts 2 --kt-method BF16 --trust-remote-code "
    "--kt-gpu-prefill-token-threshold 1024 --kt-enable-dynamic-expert-update --kt-expert-placement-strategy uniform "
    "--mem-fraction-static 0.75 --served-model-name GLM5 --enable-mixed-chunk --tensor-parallel-size 1 "
    "--enable-p2p-check --disable-shared-experts-fusion --chunked-prefill-size 64 --max-running-requests 4 "
    "--max-total-tokens 4096 --attention-backend flashinfer --fp8-gemm-backend cutlass --kv-cache-dtype bf16 "
    "--watchdog-timeout 3000 --reasoning-parser glm45 --tool-call-parser glm47"
)
HI = [{"role": "user", "content": "Hello, who are you?"}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    subprocess.run([sys.executable, "-m", "hetero_glm5.demo.random_checkpoint", folder], check=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint):
    server = Process("--model", checkpoint, *CARD_FLAGS.split(), *IN_FP32.split())
    yield server
    server.kill()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def run(*flags) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *map(str, flags)], capture_output=True, text=True, timeout=60, env=ONE_THREAD)
    return done.returncode, done.stderr


def test_start_tells_machine_model_and_how_to_try_it(server):
    until = time.monotonic() + 10  # its log is read on a thread of its own
    while not all(words in "".join(server.lines) for words in ("ISA", "model GLM5", "device cpu")):
        assert time.monotonic() < until, server.lines
        time.sleep(0.01)
    assert server.curl.startswith(f"curl {server.url}/v1/chat/completions")


def test_chat_streamed_is_chat_whole(client):
    ask = {"model": "GLM5", "messages": HI, "max_tokens": 40, "temperature": 0, "tools": [WEATHER]}
    whole = client.chat.completions.create(**ask)
    message = whole.choices[0].message
    reasoning, content, usage = "", "", None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
    assert (reasoning, content) == (getattr(message, "reasoning_content", ""), message.content or "")
    assert reasoning and usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1, "asked a second time"
    usage.prompt_tokens_details = whole.usage.prompt_tokens_details
    assert usage == whole.usage
    assert usage.completion_tokens == 40 and whole.choices[0].finish_reason == "length"
    assert usage.completion_tokens_details.reasoning_tokens > 0


def test_completions_with_text_ids_and_several_prompts(client):
    ask = {"model": "GLM5", "max_tokens": 16, "temperature": 0}
    one = client.completions.create(**ask, prompt="Once upon a time")
    streamed = client.completions.create(**ask, prompt="Once upon a time", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.choices[0].text != ""
    two = client.completions.create(**ask, prompt=["Once upon a time", "One, two"])
    assert [choice.index for choice in two.choices] == [0, 1] and two.choices[0].text == one.choices[0].text
    assert client.completions.create(**ask, prompt=[5, 6, 7]).usage.prompt_tokens == 3


def test_stop_strings_and_seeds(client):
    ask = {"model": "GLM5", "prompt": "One, two, three", "max_tokens": 40}
    text = client.completions.create(**ask, temperature=0).choices[0].text
    stop = text[5:8]
    stopped = client.completions.create(**ask, temperature=0, stop=[stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.find(stop)], "stop")
    drawn = [client.completions.create(**ask, temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_errors_reach_the_client_as_its_own(client):
    with pytest.raises(openai.NotFoundError, match="serves 'GLM5'"):
        client.chat.completions.create(model="other", messages=HI)
    with pytest.raises(openai.BadRequestError, match="n is 65"):
        client.chat.completions.create(model="GLM5", messages=HI, n=65)
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model="GLM5", prompt=[1] * 5000)
    with pytest.raises(openai.NotFoundError, match="not a route"):
        client.embeddings.create(model="GLM5", input="a")
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("GLM5", 4096)


def test_a_client_that_leaves_does_not_disturb(client):
    ask = {"model": "GLM5", "messages": HI, "temperature": 0}
    with client.chat.completions.create(**ask, max_tokens=4000, stream=True) as stream:
        next(iter(stream))
    started = time.monotonic()
    assert client.chat.completions.create(**ask, max_tokens=4).usage.completion_tokens == 4
    assert time.monotonic() - started < 10


def test_a_port_in_use_is_told_before_loading(server, checkpoint):
    port = server.url.rsplit(":", 1)[1]
    code, errors = run("--model", checkpoint, "--port", port)
    assert code == 1 and errors.startswith(f"error: Port {port} on 127.0.0.1 is already in use.")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "flags, code, sentence",
    [
        ("", 1, "error: --model is missing"),
        ("--mdoel x", 2, "error: unknown flag --mdoel; did you mean --model?"),
        ("--mode x", 2, "error: unknown flag --mode; did you mean --model?"),
        ("--model x --port abc", 2, "error: --port is 'abc'; it must be a whole number."),
        ("--model x --port", 2, "error: --port needs a value."),
        ("--model x --trust-remote-code=1", 2, "error: --trust-remote-code takes no value."),
        ("--model x stray", 2, "error: 'stray' belongs to no flag."),
        ("--model x --port 70000", 1, "error: --port is 70000; it must be at most 65535."),
        ("--model x --tool-call-parser glm46", 1, "error: --tool-call-parser is 'glm46'; it must be one of glm47"),
        ("--model CHECKPOINT --host a..b", 1, "error: --host a..b cannot be used: it is no host name"),
        (f"--model CHECKPOINT --host {'a' * 70}", 1, f"error: --host {'a' * 70} cannot be used: it is no host name"),
        ("--model CHECKPOINT --host \udcff", 1, r"error: --host \udcff cannot be used: it is no host name"),
        ("--model no/such/folder", 1, "error: no/such/folder is not a checkpoint"),
    ],
)
def test_flag_errors_are_one_line(checkpoint, flags, code, sentence):
    got, errors = run(*(checkpoint if word == "CHECKPOINT" else word for word in flags.split()))
    assert got == code and errors.startswith(sentence) and errors.count("\n") == 1


def test_help_lists_every_flag():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert all(flag in done.stdout for flag in CARD_FLAGS.split() if flag.startswith("--"))


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_broken_checkpoint_is_one_error_line(checkpoint, tmp_path, name):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / name).write_bytes(b"\0" * 100)
    code, errors = run("--model", broken, "--device", "cpu", "--port", "0")
    assert code == 1 and "Traceback" not in errors
    assert [name in line for line in errors.splitlines() if line.startswith("error: ")] == [True]


def test_sigterm_finishes_what_runs_and_a_second_signal_does_not(checkpoint):
    server = Process("--model", checkpoint, "--max-total-tokens", 4096)
    body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
    lines = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if len(lines) == 1:
                server.process.send_signal(signal.SIGTERM)
    assert lines[-2] == "data: [DONE]" and server.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))

    server = Process("--model", checkpoint, "--max-total-tokens", 4096)
    body = {**body, "max_tokens": 4000}
    with (
        pytest.raises(httpx.RemoteProtocolError),
        httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer,
    ):
        for i, _ in enumerate(answer.iter_lines()):
            if i in (0, 20):
                server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 128 + signal.SIGTERM
