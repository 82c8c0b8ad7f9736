"""Tokenizer, engine and HTTP put together: from flags and a socket to an exit code."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from pathlib import Path
from types import FrameType

import uvicorn
from rich.console import Console

from hetero_glm5 import __version__
from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.engine.engine import Engine
from hetero_glm5.server.api import Service, create_app
from hetero_glm5.server.progress import LoadDisplay, start_log
from hetero_glm5.server.tokenizer import SamplingDefaults, Tokenizer
from hetero_glm5.server.worker import EngineWorker, Report

log = logging.getLogger(__name__)

FAREWELL_SECONDS = 5  # for clients to take their error message when the engine has failed


class _Server(uvicorn.Server):
    """The first signal lets running requests finish; a second one ends the process at once."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        log.info("finishing what runs; a second signal stops at once")

    def give_up(self) -> None:
        self.config.timeout_graceful_shutdown = FAREWELL_SECONDS
        self.should_exit = True


def serve(config: EngineConfig, server_config: ServerConfig, listening: socket.socket) -> int:
    """Serves until a signal or a failure; returns the exit code. Raises UserError."""
    console = Console(stderr=True)
    start_log(console)
    name = server_config.served_model_name or Path(config.model).resolve().name
    log.info("hetero_glm5 %s, model %s from %s", __version__, name, config.model)
    tokenizer, defaults = Tokenizer.from_folder(config.model), SamplingDefaults.from_folder(config.model)
    display = LoadDisplay(console)

    def load(report: Report) -> Engine:
        engine = Engine.load(config, tokenizer, report)
        log.info("device %s, context length %d", engine.config.device, engine.context_length)
        return engine

    def ready() -> None:
        display.close()
        print(_greeting(name, listening, tokenizer.has_chat, server_config.api_key is not None), flush=True)

    def failed() -> None:
        display.close()
        print(f"error: {worker.failure}", file=sys.stderr, flush=True)
        server.give_up()

    worker = EngineWorker(
        load,
        watchdog_timeout=server_config.watchdog_timeout,
        on_progress=display.update,
        on_ready=ready,
        on_failure=failed,
    )
    app = create_app(Service(worker, tokenizer, name, server_config, defaults))
    server = _Server(uvicorn.Config(app, log_config=None, log_level="warning", access_log=False))
    server.run(sockets=[listening])
    display.close()
    code = 1 if worker.state == "failed" else 0
    if worker.alive:  # it loads, or hangs: waiting for it could take for ever
        sys.stdout.flush()
        os._exit(code)
    return code


def _greeting(name: str, listening: socket.socket, has_chat: bool, has_key: bool) -> str:
    """Where the server is, and a line to try it with."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    ask = {"messages": [{"role": "user", "content": "Hello"}]} if has_chat else {"prompt": "Hello"}
    route = "/v1/chat/completions" if has_chat else "/v1/completions"
    key = " -H 'Authorization: Bearer KEY'" if has_key else ""
    body = json.dumps({**ask, "max_tokens": 64})
    return f"{name} is ready at {url}\ncurl {url}{route}{key} -H 'Content-Type: application/json' -d '{body}'"
