"""Tokenizer, engine and HTTP put together: from flags and a socket to an exit code."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

import uvicorn
from rich.console import Console

from hetero_glm5 import __version__
from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.core import UserError
from hetero_glm5.engine.engine import Engine
from hetero_glm5.server.api import create_app
from hetero_glm5.server.progress import LoadDisplay, start_log
from hetero_glm5.server.service import Service
from hetero_glm5.server.tokenizer import SamplingDefaults, Tokenizer
from hetero_glm5.server.worker import EngineWorker, Report

log = logging.getLogger(__name__)

# Seconds that a connection may idle: longer than clients keep one (httpx 5, aiohttp 15, Go 90), or a request may come
# just when the server closes it.
KEEP_ALIVE = 120

STALL_SECONDS = 5.0  # when the server ends and the engine has nothing left to say: how long a client may do nothing


class _Server(uvicorn.Server):
    """The first signal lets running requests finish; a second one ends the process at once."""

    def __init__(self, config: uvicorn.Config, worker: EngineWorker):
        super().__init__(config)
        self._worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        log.info("finishing what runs; a second signal stops at once")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cutting = asyncio.create_task(self._cut_what_stalls())
        await super().shutdown(sockets)
        cutting.cancel()

    async def _cut_what_stalls(self) -> None:
        """Cuts all connections once nothing has been computed, and no client has taken anything, for STALL_SECONDS:
        what is left then is half-sent requests, and clients that do not read."""
        before, moved = (0, 0), time.monotonic()
        while True:
            connections = list(self.server_state.connections)
            now = (len(connections), sum(c.transport.get_write_buffer_size() for c in connections))
            if self._worker.busy or now != before:
                before, moved = now, time.monotonic()
            elif time.monotonic() - moved >= STALL_SECONDS:
                for connection in connections:
                    connection.transport.abort()
            await asyncio.sleep(0.1)


def serve(config: EngineConfig, server_config: ServerConfig, listening: socket.socket) -> int:
    """Serves until a signal or a failure; returns the exit code. Raises UserError."""
    name = _model_name(config, server_config)
    _check_key(server_config.api_key)
    console = Console(stderr=True)
    start_log(console)
    log.info("hetero_glm5 %s, model %s from %s", __version__, name, config.model)
    tokenizer, defaults = Tokenizer.from_folder(config.model), SamplingDefaults.from_folder(config.model)
    display = LoadDisplay(console)

    def load(report: Report) -> Engine:
        engine = Engine.load(config, tokenizer, report)
        log.info("device %s, context length %d", engine.config.device, engine.context_length)
        return engine

    def ready() -> None:
        _print(display, _greeting(name, listening, tokenizer.has_chat, server_config.api_key is not None), sys.stdout)

    def failed() -> None:
        server.should_exit = True
        _print(display, f"error: {worker.failure}", sys.stderr)

    worker = EngineWorker(
        load,
        watchdog_timeout=server_config.watchdog_timeout,
        request_timeout=server_config.request_timeout,
        on_progress=display.update,
        on_ready=ready,
        on_failure=failed,
    )
    app = create_app(Service(worker, tokenizer, name, server_config, defaults))
    quiet = {"log_config": None, "log_level": "warning", "access_log": False}
    server = _Server(uvicorn.Config(app, timeout_keep_alive=KEEP_ALIVE, **quiet), worker)
    server.run(sockets=[listening])
    with suppress(OSError):
        display.close()
    code = 1 if worker.state == "failed" else 0
    if worker.alive:  # it loads, or hangs: waiting for it could take for ever
        os._exit(code)
    return code


def _model_name(config: EngineConfig, server_config: ServerConfig) -> str:
    """What clients call the model."""
    name = server_config.served_model_name
    if name is None:
        name = Path(config.model).resolve().name
    if not name or not name.isprintable():  # bytes of a command line that are no UTF-8 are not printable either
        raise UserError(f"The model's name is {name!r}; it must be printable. Choose one with --served-model-name.")
    return name


def _check_key(key: str | None) -> None:
    if key is not None and (not key or key != key.strip() or not key.isprintable()):
        raise UserError(
            "--api-key is empty, has spaces around it or holds characters that are not printable; no client could send "
            "it. Choose another, or leave the flag out to require none."
        )


def _print(display: LoadDisplay, line: str, stream: TextIO) -> None:
    """Ends the bar and prints. A terminal that is gone or a full disk is no reason to stop serving, or not to end."""
    with suppress(OSError, ValueError):
        display.close()
        print(line, file=stream, flush=True)


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
