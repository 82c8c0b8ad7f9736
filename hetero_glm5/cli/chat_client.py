"""What `hetero-glm5 chat` says to a server and hears from it, in OpenAI's words; and a server in this process."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson
import uvicorn

from hetero_glm5.config import EngineConfig, ServerConfig
from hetero_glm5.core import LoadProgress, UserError
from hetero_glm5.engine.engine import Engine
from hetero_glm5.model_config import ModelConfig, checkpoint_folder
from hetero_glm5.server.api import create_app
from hetero_glm5.server.service import Service
from hetero_glm5.server.tokenizer import SamplingDefaults, Tokenizer
from hetero_glm5.server.worker import EngineWorker

SILENCE = 60.0  # seconds after which a server that says nothing is given up; it says at least that it lives
LOOK = 0.05  # seconds between two looks at a server that loads

Piece = tuple[str, str]  # "reasoning", "content" or "call", and text of it


@dataclass
class Answer:
    """One answer, as its chunks come. Times are time.monotonic()'s; first and last: of pieces."""

    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    def take(self, chunk: dict[str, Any]) -> list[Piece]:
        """Adds a chunk; what of it is to be shown."""
        self.usage = chunk.get("usage") or self.usage
        pieces: list[Piece] = []
        for choice in chunk.get("choices", []):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            delta = choice.get("delta") or {}
            if text := delta.get("reasoning_content"):
                self.reasoning += text
                pieces.append(("reasoning", text))
            if text := delta.get("content"):
                self.content += text
                pieces.append(("content", text))
            for call in delta.get("tool_calls") or []:
                pieces.append(("call", self._call(call)))
        if pieces:
            self.last = time.monotonic()
            self.first = self.first or self.last
        return pieces

    def _call(self, delta: dict[str, Any]) -> str:
        said = delta.get("function") or {}
        name, arguments = said.get("name") or "", said.get("arguments") or ""
        if not delta["index"] < len(self.calls):
            self.calls.append({"id": delta["id"], "type": "function", "function": {"name": name, "arguments": ""}})
            name = f"\n{name}" if len(self.calls) > 1 else name
        self.calls[delta["index"]]["function"]["arguments"] += arguments
        return f"{name} {arguments}" if name else arguments

    def message(self) -> dict[str, Any]:
        """As a turn of the conversation."""
        said: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            said["reasoning_content"] = self.reasoning
        if self.calls:
            said["tool_calls"] = self.calls
        return said

    @property
    def summary(self) -> str:
        """Tokens, time to the first of them, and how many a second after it. One that was cut short has no counts."""
        wait = f"the first after {(self.first or self.started) - self.started:.2f} s"
        if not self.usage:
            return wait
        tokens, cached = self.usage["completion_tokens"], self.usage.get("prompt_tokens_details") or {}
        prompt = f"{self.usage['prompt_tokens']} tokens of prompt, {cached.get('cached_tokens', 0)} known"
        seconds = self.last - (self.first or self.last)
        rate = f", {(tokens - 1) / seconds:.1f} tokens/s" if seconds > 0 else ""
        return f"{prompt}; {tokens} tokens, {wait}{rate}"


class Client:
    """A server by its URL. Raises UserError on what it refuses, and if there is none."""

    def __init__(self, url: str, api_key: str | None = None):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--url is {url!r}; it must be like http://127.0.0.1:30000.")
        self.url, self._secure, self._host = url, parts.scheme == "https", parts.netloc
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def model(self) -> str:
        """The name of the model that is served."""
        with self._asking("GET", "/v1/models", None) as response:
            return orjson.loads(response.read())["data"][0]["id"]

    def chunks(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Of a streamed chat completion. Closing the generator ends the request."""
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        with self._asking("POST", "/v1/chat/completions", body | stream) as response:
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if data == line.strip() or data == b"[DONE]":  # a ping, an empty line, the end
                    continue
                chunk = orjson.loads(data)
                if "error" in chunk:
                    raise UserError(chunk["error"]["message"])
                yield chunk

    @contextmanager
    def _asking(self, method: str, route: str, body: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, timeout=SILENCE)
        try:
            connection.request(method, self._prefix + route, orjson.dumps(body) if body else None, self._headers)
            with connection.getresponse() as response:
                if response.status != 200:
                    raise UserError(_refusal(response))
                yield response
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"{self.url} does not answer ({error}). Start a server (make serve), name another one with --url, or "
                "chat without one: --model demo."
            ) from error
        finally:
            connection.close()


def _refusal(response: http.client.HTTPResponse) -> str:
    body = response.read()
    try:
        return orjson.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status} {response.reason}."


@contextmanager
def embedded(model: str, report: Callable[[LoadProgress], None]) -> Iterator[str]:
    """Serves a model from this process, on a free port, and gives the URL. Raises UserError if it cannot be loaded."""
    folder = checkpoint_folder(model)
    ModelConfig.load(folder)  # so that a folder that is no checkpoint is told as that, not as a missing tokenizer
    tokenizer, defaults = Tokenizer.from_folder(folder), SamplingDefaults.from_folder(folder)
    config = ServerConfig(reasoning_parser="glm45", tool_call_parser="glm47")
    worker = EngineWorker(
        lambda told: Engine.load(EngineConfig(model=folder), tokenizer, told),
        watchdog_timeout=config.watchdog_timeout,
        on_progress=report,
    )
    app = create_app(Service(worker, tokenizer, model, config, defaults))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    try:
        while worker.state == "loading":
            time.sleep(LOOK)
        if worker.state == "failed":
            raise UserError(str(worker.failure))
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
