"""serve() as a process whose engine is a script: what the process does when its engine hangs or fails, when clients do,
and when nothing takes its output."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.core import UserError
from hetero_glm5.demo.tokenizer import build_tokenizer
from hetero_glm5.server.serve import serve

SCRIPTED = """
import sys, time
from types import SimpleNamespace
from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.core import Sequence, TokenEvent
from hetero_glm5.launch_server import listen
from hetero_glm5.server import serve

class Engine:
    context_length = 100_000
    num_waiting = 0
    config = SimpleNamespace(device="none", max_queued_requests=9)
    def __init__(self):
        self.running = []
    @property
    def busy(self):
        return bool(self.running)
    @property
    def num_running(self):
        return len(self.running)
    def add_all(self, tokens, params, salt, timeout):
        return [self.add(tokens, params)]
    def add(self, tokens, params):
        self.running.append(Sequence(tokens, params, len(tokens)))
        return self.running[-1]
    def abort(self, seq):
        if seq in self.running:
            self.running.remove(seq)
    def fail_step(self, message):
        failed, self.running = self.running, []
        return [TokenEvent(seq, None, "", "error", message) for seq in failed]
    def close(self):
        pass
    @classmethod
    def load(cls, config, tokenizer, report):
        return cls()
    def step(self):
        STEP

serve.Engine = Engine
sys.exit(serve.serve(EngineConfig(model=sys.argv[1]), ServerConfig(watchdog_timeout=1), listen("127.0.0.1", 0)))
"""
HANGS = "time.sleep(1000)"
FAILS = "raise RuntimeError('device lost')"
TELLS = """time.sleep(0.01)
        for seq in self.running:
            seq.tokens.append(1)
        events = [TokenEvent(s, 1, "x" * 9000, "length" if s.num_output == s.params.max_tokens else None)
                  for s in self.running]
        self.running = [event.seq for event in events if not event.finish_reason]
        return events"""


def start(folder, step: str, **pipes) -> subprocess.Popen:
    (folder / "tokenizer.json").write_text(build_tokenizer(600).to_str())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", SCRIPTED.replace("STEP", step), folder], text=True, env=env, **pipes)


def url_of(process: subprocess.Popen) -> str:
    return re.search(r"ready at (\S+)", process.stdout.readline())[1]


def send(url: str, head: str, body: str = "") -> socket.socket:
    """A raw client; with as small a buffer for answers as there can be."""
    host, port = url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n{body}".encode())
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_hanging_engine_ends_the_process_but_no_client_hangs(tmp_path, stream):
    process = start(tmp_path, HANGS)
    url = url_of(process)
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "stream": stream}, timeout=20)
    assert answer.status_code == (200 if stream else 500)
    assert "finished no step for 1 s (--watchdog-timeout)" in answer.text
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "in step" in errors and "error: The engine finished no step" in errors


def test_a_signal_lets_streams_finish_but_waits_for_no_client_that_does_nothing(tmp_path):
    process = start(tmp_path, TELLS)
    url = url_of(process)
    half = send(url, "Content-Length: 1000", '{"prompt":')
    body = '{"prompt": "a", "max_tokens": 500, "stream": true}'
    deaf = send(url, f"Content-Length: {len(body)}", body)
    got = []
    whole = {"prompt": "a", "max_tokens": 150, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=whole, timeout=20) as answer:
        for line in answer.iter_lines():
            got.append(line)
            if len(got) == 1:
                process.send_signal(signal.SIGTERM)
    assert got[-2] == "data: [DONE]"
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 0 and "Traceback" not in errors
    half.close()
    deaf.close()


def test_a_lost_device_ends_the_process_also_when_nothing_takes_its_last_words(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(tmp_path, FAILS, stderr=full)
        url = url_of(process)
        for _ in range(3):
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=20)
            assert answer.status_code == 500 and "device lost" in answer.text
        assert process.wait(20) == 1
        process.communicate()


@pytest.mark.parametrize("key", ["", " a", "a\n", "\udcff"])
def test_a_key_that_no_client_could_send_is_refused(key):
    with socket.socket() as listening, pytest.raises(UserError, match="--api-key is empty, has spaces"):
        serve(EngineConfig(model="x"), ServerConfig(api_key=key), listening)


@pytest.mark.parametrize(
    "model, name, shown",
    [("x", "", "''"), ("x", "\udcff", r"'\\udcff'"), ("a\udcff", None, r"'a\\udcff'"), ("/", None, "''")],
)
def test_a_name_that_no_answer_could_hold_is_refused(model, name, shown):
    with socket.socket() as listening, pytest.raises(UserError, match=f"The model's name is {shown}; it must be"):
        serve(EngineConfig(model=model), ServerConfig(served_model_name=name), listening)
