"""A server on a thread of the test's process."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from hetero_glm5.config import ServerConfig
from hetero_glm5.server.api import create_app
from hetero_glm5.server.service import Service
from hetero_glm5.server.tokenizer import SamplingDefaults, Tokenizer
from hetero_glm5.server.worker import EngineWorker


class Served:
    """A running server: `http` is a client for it."""

    def __init__(self, url: str, worker: EngineWorker, server: uvicorn.Server):
        self.url, self.worker, self.server = url, worker, server
        self.http = httpx.Client(base_url=url, timeout=20)

    def chunks(self, route: str, **body) -> list[str]:
        """The data of each event of a stream."""
        with self.http.stream("POST", route, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]


@contextmanager
def running_server(load, tokenizer: Tokenizer, config: ServerConfig, wait: bool) -> Iterator[Served]:
    worker = EngineWorker(load, watchdog_timeout=config.watchdog_timeout)
    app = create_app(Service(worker, tokenizer, "tiny", config, SamplingDefaults()))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    served = Served(f"http://127.0.0.1:{listening.getsockname()[1]}", worker, server)
    try:
        while wait and worker.state == "loading":
            time.sleep(0.005)
        yield served
    finally:
        served.http.close()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server does not stop"
