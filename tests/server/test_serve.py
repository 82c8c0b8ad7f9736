"""serve() as a process whose engine is a script: what the process does when its engine hangs."""

import os
import re
import subprocess
import sys

import httpx
import pytest

from hetero_glm5.demo.tokenizer import build_tokenizer

STUCK = """
import sys, time
from types import SimpleNamespace
from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.core import Sequence
from hetero_glm5.launch_server import listen
from hetero_glm5.server import serve

class Engine:
    busy, context_length, config = False, 100, SimpleNamespace(device="none")
    def add(self, tokens, params):
        self.busy = True
        return Sequence(tokens, params, len(tokens))
    def step(self):
        time.sleep(1000)
    @classmethod
    def load(cls, config, tokenizer, report):
        return cls()

serve.Engine = Engine
sys.exit(serve.serve(EngineConfig(model=sys.argv[1]), ServerConfig(watchdog_timeout=1), listen("127.0.0.1", 0)))
"""


@pytest.mark.parametrize("stream", [True, False])
def test_a_hanging_engine_ends_the_process_but_no_client_hangs(tmp_path, stream):
    (tmp_path / "tokenizer.json").write_text(build_tokenizer(600).to_str())
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    url = re.search(r"ready at (\S+)", process.stdout.readline())[1]
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "stream": stream}, timeout=20)
    assert answer.status_code == (200 if stream else 500)
    assert "finished no step for 1 s (--watchdog-timeout)" in answer.text
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "in step" in errors and "error: The engine finished no step" in errors
