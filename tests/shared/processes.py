"""The server as a process of its own."""

import os
import re
import subprocess
import sys
import threading

# Two torch threads on two busy cores wait for each other: a step of a small model then takes 100 times as long.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "hetero_glm5.launch_server"]
# Else tokens may change with their batch, and when experts move.
IN_FP32 = "--dtype float32 --kt-method FP32 --kv-cache-dtype float32"


class Process:
    """A server process; `url` once it is ready."""

    def __init__(self, *flags):
        command = [*COMMAND, "--device", "cpu", "--port", "0", *map(str, flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes, env=ONE_THREAD)
        self.lines: list[str] = []
        threading.Thread(target=self._read_log, daemon=True).start()
        self.greeting = self.process.stdout.readline()
        found = re.search(r"ready at (http://\S+)", self.greeting)
        assert found, f"{self.greeting}{''.join(self.lines)}"
        self.url = found[1]
        self.curl = self.process.stdout.readline()

    def _read_log(self):
        self.lines.extend(self.process.stderr)

    def wait(self, seconds: float = 20) -> int:
        return self.process.wait(seconds)

    def kill(self):
        self.process.kill()
        self.process.wait()
