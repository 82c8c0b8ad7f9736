"""The HTTP API: routes, errors in OpenAI's shape, limits and keys. What a request does is in streaming.py."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from hetero_glm5.config import ServerConfig
from hetero_glm5.core import RequestError, SamplingParams
from hetero_glm5.server.anthropic_api import messages_router
from hetero_glm5.server.collectors import ChatCollector, TextCollector
from hetero_glm5.server.errors import KNOWN, RETRY_SECONDS, NotReady, UnknownModel, bug_body, describe, error_body
from hetero_glm5.server.guard import Guard, allowed_hosts, cross_origin, request_id
from hetero_glm5.server.openresponses_api import responses_router
from hetero_glm5.server.parsers import OutputParser
from hetero_glm5.server.protocol import ChatRequest, CompletionRequest, SamplingRequest, parse_request
from hetero_glm5.server.replay import Replay
from hetero_glm5.server.responses import Answer, Kind
from hetero_glm5.server.streaming import Collector, EventStream, collect, stream, unless_disconnected
from hetero_glm5.server.tokenizer import SamplingDefaults, Tokenizer
from hetero_glm5.server.worker import EngineWorker

MAX_BODY_BYTES = 64 << 20  # a prompt of a million tokens is about 4 MB
STREAM_PATIENCE = 1.0  # seconds for the engine to refuse a stream; then its headers go out


R = TypeVar("R", bound=SamplingRequest)


class Service:
    """What the routes need: the engine, the tokenizer and how the model is called."""

    def __init__(
        self,
        worker: EngineWorker,
        tokenizer: Tokenizer,
        model: str,
        config: ServerConfig,
        defaults: SamplingDefaults,
    ):
        self.worker, self.tokenizer, self.model, self.config, self.defaults = worker, tokenizer, model, config, defaults
        self.started = int(time.time())
        self.replay = Replay()

    async def health(self) -> Response:
        worker = self.worker
        if worker.state == "ready":
            return json_response({"status": "ok"})
        if worker.state == "failed":
            return json_response({"status": "failed", "message": worker.failure}, 503)
        progress = worker.progress
        body = {
            "status": "loading",
            "stage": progress.stage,
            "bytes_done": progress.bytes_done,
            "bytes_total": progress.bytes_total,
            "gb_per_s": round(progress.gb_per_s, 3),
            "eta_seconds": progress.eta_seconds,
        }
        return json_response(body, 503, {"Retry-After": RETRY_SECONDS})

    async def models(self) -> Response:
        return json_response({"object": "list", "data": [self._card()]})

    async def one_model(self, name: str) -> Response:
        self.check_model(name)
        return json_response(self._card())

    async def start_recording(self) -> Response:
        await self.worker.ask(lambda engine: engine.recorder.start())
        return json_response({"recording": True})

    async def stop_recording(self) -> Response:
        await self.worker.ask(lambda engine: engine.recorder.stop())
        return json_response({"recording": False})

    async def dump_recording(self) -> Response:
        return json_response(await self.worker.ask(lambda engine: engine.recorder.dump()))

    async def completions(self, request: Request) -> Response:
        asked = await self._asked(CompletionRequest, request)
        params = asked.sampling(self.defaults, asked.grammar())
        if len(asked.prompt) * params.n > self.worker.max_queued:
            raise RequestError(
                f"this request has {len(asked.prompt)} prompts to answer {params.n} times; at most "
                f"{self.worker.max_queued} answers can wait (--max-queued-requests). Send several requests.",
                "prompt",
            )
        prompts = [p if isinstance(p, list) else await asyncio.to_thread(self.encode, p) for p in asked.prompt]
        collector = TextCollector(asked, prompts, params, self.tokenizer)
        return await self._answer(request, asked, prompts, params, collector)

    async def chat(self, request: Request) -> Response:
        asked = await self._asked(ChatRequest, request)
        text, prompt = await asyncio.to_thread(self._chat_prompt, asked)
        reasoning = self.config.reasoning_parser is not None and asked.separate_reasoning is not False
        opened = text.rstrip().endswith("<think>")
        thinking = reasoning and opened
        params = asked.sampling(self.defaults, asked.grammar(thinking=thinking))

        def parser() -> OutputParser:
            tools = asked.offered_tools if self.config.tool_call_parser is not None else None
            return OutputParser(thinking=thinking, reasoning=reasoning, tools=tools, parallel=asked.parallel)

        replay = self.replay if reasoning or not opened else None  # content that holds reasoning is rendered
        collector = ChatCollector(prompt, parser, params, self.tokenizer, replay, counts_reasoning=reasoning)
        return await self._answer(request, asked, [prompt], params, collector)

    def _chat_prompt(self, asked: ChatRequest) -> tuple[str, list[int]]:
        messages, tools = asked.plain_messages, asked.offered_tools
        if tools is not None and self.config.tool_call_parser is None:
            raise RequestError("tools need a server started with --tool-call-parser glm47.", "tools")
        text = self.replay.render(self.tokenizer, messages, tools, **asked.template_kwargs)
        return text, self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Raises RequestError, for texts that are too long without encoding them."""
        return self.tokenizer.encode(text, self.worker.context_length)

    async def _asked(self, kind: type[R], request: Request) -> R:
        """The request, with everything checked that needs no encoded prompt."""
        asked = parse_request(kind, await self.body(request))
        self.check_model(asked.model)
        asked.sampling(self.defaults, asked.grammar())
        return asked

    async def _answer(
        self,
        request: Request,
        asked: SamplingRequest,
        prompts: list[list[int]],
        params: SamplingParams,
        collector: Collector,
    ) -> Response:
        kind: Kind = "chat.completion" if isinstance(asked, ChatRequest) else "text_completion"
        answer = Answer(self.model, kind, request_id(request))
        generation = await self.worker.submit(
            prompts,
            params,
            STREAM_PATIENCE if asked.stream else None,
            salt=asked.cache_salt,
            names=asked.names | {answer.token, answer.id},
        )
        if asked.stream:
            chunks = stream(generation, collector, answer, include_usage=asked.include_usage)
            return EventStream(chunks, lambda: self.worker.close(generation))
        try:
            whole = await unless_disconnected(request, collect(generation, collector, answer))
        finally:
            self.worker.close(generation)
        return Response(status_code=499) if whole is None else json_response(whole)

    async def body(self, request: Request) -> bytes:
        """Raises NotReady, and HTTPException for one that is too large."""
        if self.worker.state != "ready":  # said before a long prompt is read and encoded
            raise NotReady(self.worker.failure or "The model is still loading; see /health.")
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413, f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.")
        return bytes(body)

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModel unless the name is the served model's, or none."""
        if name not in (None, self.model):
            raise UnknownModel(f"The model {name!r} does not exist; this server serves {self.model!r}.", "model")

    def _card(self) -> dict[str, Any]:
        length = self.worker.context_length or None  # not known while loading
        return {
            "id": self.model,
            "object": "model",
            "created": self.started,
            "owned_by": "hetero_glm5",
            "max_model_len": length,
        }


def create_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    app = FastAPI(title="hetero_glm5", lifespan=lifespan, openapi_url=None)
    app.add_middleware(CORSMiddleware, **cross_origin(service.config))
    app.add_middleware(Guard, hosts=allowed_hosts(service.config))  # added last, it comes first
    app.add_api_route("/health", service.health)
    guarded = APIRouter(dependencies=[Depends(_key_check(service.config.api_key))])
    guarded.add_api_route("/v1/models", service.models)
    guarded.add_api_route("/v1/models/{name:path}", service.one_model)
    guarded.add_api_route("/v1/completions", service.completions, methods=["POST"])
    guarded.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    guarded.include_router(messages_router(service))
    guarded.include_router(responses_router(service))
    guarded.add_api_route("/start_expert_distribution_record", service.start_recording, methods=["POST"])
    guarded.add_api_route("/stop_expert_distribution_record", service.stop_recording, methods=["POST"])
    guarded.add_api_route("/dump_expert_distribution_record", service.dump_recording, methods=["POST"])
    app.include_router(guarded)
    for kind in KNOWN:
        app.add_exception_handler(kind, _known_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _bug)
    return app


def _key_check(key: str | None) -> Any:
    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key", "")
        if key is not None and not hmac.compare_digest(given.encode("latin-1"), key.encode()):  # headers are bytes
            raise HTTPException(401, "The API key is missing or wrong: send Authorization: Bearer KEY.")

    return check


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


async def _known_error(request: Request, error: Exception) -> Response:
    status, body = describe(error)
    return json_response(body, status, {"Retry-After": RETRY_SECONDS} if status in (429, 503) else None)


async def _http_error(request: Request, error: Any) -> Response:
    """Routing errors: 404, 405, and those that this file raises."""
    where = f"{request.method} {request.url.path}"
    sentences = {404: f"{where} is not a route of this server.", 405: f"{where}: this method is not allowed here."}
    codes = {401: "invalid_api_key", 404: "unknown_route", 405: "method_not_allowed", 413: "body_too_large"}
    message = sentences.get(error.status_code, str(error.detail))
    body = error_body(message, "invalid_request_error", None, codes.get(error.status_code))
    return json_response(body, error.status_code, error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    return json_response(bug_body(error), 500)


async def _gone(request: Request, error: Exception) -> Response:
    """The client left while it sent its request: nobody reads this."""
    return Response(status_code=499)
