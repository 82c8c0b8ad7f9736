"""What the routes share, and OpenAI's routes. What a request does is in streaming.py."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from hetero_glm5.config import ServerConfig
from hetero_glm5.core import RequestError, SamplingParams
from hetero_glm5.server.collectors import ChatCollector, TextCollector
from hetero_glm5.server.errors import NotReady, UnknownModel
from hetero_glm5.server.guard import request_id
from hetero_glm5.server.parsers import OutputParser
from hetero_glm5.server.protocol import ChatRequest, CompletionRequest, SamplingRequest, parse_request
from hetero_glm5.server.replay import Replay
from hetero_glm5.server.responses import Answer, Kind, json_response
from hetero_glm5.server.streaming import ChoicesTeller, Collector, patience, reply
from hetero_glm5.server.tokenizer import SamplingDefaults, Tokenizer
from hetero_glm5.server.worker import EngineWorker

MAX_BODY_BYTES = 64 << 20  # a prompt of a million tokens is about 4 MB
LARGE_BODY_BYTES = 64 << 10  # from here on a body is read in a thread, beside which other requests go on
RETRY_SECONDS = "5"

M = TypeVar("M", bound=BaseModel)


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
        asked = await self.asked(CompletionRequest, request)
        self.check_model(asked.model)
        params = await asyncio.to_thread(lambda: asked.sampling(self.defaults, asked.grammar()))
        self.check_count(len(asked.prompt), params.n)
        prompts = [p if isinstance(p, list) else await asyncio.to_thread(self.encode, p) for p in asked.prompt]
        collector = TextCollector(asked, prompts, params, self.tokenizer)
        return await self._answer(request, asked, prompts, params, collector)

    async def chat(self, request: Request) -> Response:
        asked = await self.asked(ChatRequest, request)
        self.check_model(asked.model)
        reasoning = self.config.reasoning_parser is not None and asked.separate_reasoning is not False

        def prepared() -> tuple[SamplingParams, list[int], bool]:
            text = self.chat_text(asked)
            opened = text.rstrip().endswith("<think>")
            params = asked.sampling(self.defaults, asked.grammar(thinking=reasoning and opened))
            prompt = self.encode(text)
            return self.fitting(params, prompt), prompt, opened

        params, prompt, opened = await asyncio.to_thread(prepared)
        thinking = reasoning and opened

        def parser() -> OutputParser:
            return OutputParser(
                thinking=thinking, reasoning=reasoning, tools=asked.offered_tools, parallel=asked.parallel
            )

        replay = self.replay if reasoning or not opened else None  # content that holds reasoning is rendered
        collector = ChatCollector(prompt, parser, params, self.tokenizer, replay, counts_reasoning=reasoning)
        return await self._answer(request, asked, [prompt], params, collector)

    def chat_text(self, asked: ChatRequest) -> str:
        """The prompt. Raises RequestError."""
        messages, tools = asked.plain_messages, asked.offered_tools
        if tools is not None and self.config.tool_call_parser is None:
            raise RequestError("tools need a server started with --tool-call-parser glm47.", "tools")
        return self.replay.render(self.tokenizer, messages, tools, **asked.template_kwargs)

    def fitting(self, params: SamplingParams, prompt: list[int]) -> SamplingParams:
        """What agents ask for is a bound, often the model's own: it may be more than the prompt leaves of the
        context."""
        room = self.worker.context_length - len(prompt)
        return replace(params, max_tokens=room) if 1 <= room < (params.max_tokens or 0) else params

    def encode(self, text: str) -> list[int]:
        """Raises RequestError, for texts that are too long without encoding them."""
        return self.tokenizer.encode(text, self.worker.context_length)

    async def asked(self, kind: type[M], request: Request) -> M:
        """What the body says. Raises like body(), and RequestError."""
        return await parsed(kind, await self.body(request))

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
            patience(),
            salt=asked.cache_salt,
            names=asked.names | {answer.token, answer.id},
        )
        teller = ChoicesTeller(generation, collector, answer, include_usage=asked.include_usage)
        return await reply(request, self.worker, generation, teller, asked.stream)

    def check_count(self, prompts: int, answers: int) -> None:
        """Raises RequestError for more prompts, with so many answers each, than can wait."""
        if prompts * answers > self.worker.max_queued:
            raise RequestError(
                f"this request has {prompts} prompts to answer {answers} times; at most {self.worker.max_queued} "
                "answers can wait (--max-queued-requests). Send several requests.",
                "prompt",
            )

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


async def parsed(kind: type[M], body: bytes) -> M:
    """Raises RequestError."""
    if len(body) < LARGE_BODY_BYTES:
        return parse_request(kind, body)
    return await asyncio.to_thread(parse_request, kind, body)
