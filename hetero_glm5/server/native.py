"""Routes that SGLang and vLLM have beside OpenAI's: /generate, tokens, parsers, what the server is and how it does."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from hetero_glm5 import __version__
from hetero_glm5.core import RequestError, SamplingParams
from hetero_glm5.server import fields
from hetero_glm5.server.errors import GenerationFailed
from hetero_glm5.server.generate import GenerateCollector, GenerateRequest, NativeAnswer
from hetero_glm5.server.guard import request_id
from hetero_glm5.server.info import settled, snapshot
from hetero_glm5.server.metrics import Metrics
from hetero_glm5.server.parsers import OutputParser, ParsedMessage
from hetero_glm5.server.protocol import ChatRequest, StrictFields
from hetero_glm5.server.responses import json_response
from hetero_glm5.server.service import Service, parsed
from hetero_glm5.server.streaming import ChoicesTeller, patience, reply

PROBE_SECONDS = 20.0  # that /health_generate waits for a token
SCRAPE_SECONDS = 1.0  # that /metrics waits for the engine, which listens between two steps


class TokenizeRequest(StrictFields):
    model: str | None = None
    prompt: str | Annotated[list[str], Field(fail_fast=True)]
    add_special_tokens: bool = True  # this tokenizer adds none


class DetokenizeRequest(StrictFields):
    model: str | None = None
    tokens: fields.Prompts


class AbortRequest(StrictFields):
    rid: str = ""
    abort_all: bool = False


class ParseCallRequest(StrictFields):
    text: str
    tools: fields.Tools
    tool_call_parser: Literal["glm47"] = "glm47"


class SeparateRequest(StrictFields):
    text: str
    reasoning_parser: Literal["glm45"] = "glm45"


class Native:
    def __init__(self, service: Service):
        self.service, self.worker, self.tokenizer = service, service.worker, service.tokenizer
        self.metrics = Metrics(service.model)
        self.worker.observe = self.metrics.observe

    def add_routes(self, router: APIRouter) -> None:
        for path, route in {
            "/generate": self.generate,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
            "/flush_cache": self.flush_cache,
            "/abort_request": self.abort_request,
            "/parse_function_call": self.parse_function_call,
            "/separate_reasoning": self.separate_reasoning,
        }.items():
            router.add_api_route(path, route, methods=["POST"])
        for path, route in {
            "/get_model_info": self.model_info,
            "/get_server_info": self.server_info,
            "/server_info": self.server_info,
            "/health_generate": self.health_generate,
            "/metrics": self.prometheus,
        }.items():
            router.add_api_route(path, route)

    async def generate(self, request: Request) -> Response:
        service = self.service
        asked = await service.asked(GenerateRequest, request)
        given, params = await asyncio.to_thread(lambda: (asked.prompts, asked.sampling(service.defaults)))
        service.check_count(len(given), params.n)
        prompts = [p if isinstance(p, list) else await asyncio.to_thread(service.encode, p) for p in given]
        name = asked.rid or request_id(request)
        collector = GenerateCollector(asked, prompts, self.tokenizer, name)
        answer, names = NativeAnswer(asked.many), frozenset((name, request_id(request)))
        generation = await self.worker.submit(prompts, params, patience(), names=names)
        return await reply(request, self.worker, generation, ChoicesTeller(generation, collector, answer), asked.stream)

    async def tokenize(self, request: Request) -> Response:
        """vLLM's and SGLang's: of a text, of several, or of a chat as the model would see it."""
        body = await self.service.body(request)
        if b'"messages"' in body:
            chat = await parsed(ChatRequest, body)
            self.service.check_model(chat.model)
            tokens = await asyncio.to_thread(lambda: self.service.encode(self.service.chat_text(chat)))
            return self._counted(tokens, len(tokens))
        asked = await parsed(TokenizeRequest, body)
        self.service.check_model(asked.model)
        if isinstance(asked.prompt, str):
            tokens = await asyncio.to_thread(self.service.encode, asked.prompt)
            return self._counted(tokens, len(tokens))
        many = [await asyncio.to_thread(self.service.encode, text) for text in asked.prompt]
        return self._counted(many, [len(tokens) for tokens in many])

    def _counted(self, tokens: list[Any], counts: int | list[int]) -> Response:
        return json_response({"tokens": tokens, "count": counts, "max_model_len": self.worker.context_length})

    async def detokenize(self, request: Request) -> Response:
        asked = await self.service.asked(DetokenizeRequest, request)
        self.service.check_model(asked.model)
        if not isinstance(asked.tokens[0], list):
            raise RequestError("tokens holds something else than token ids.", "tokens")
        texts = await asyncio.to_thread(lambda: list(map(self.tokenizer.decode, asked.tokens)))
        text = texts[0] if len(texts) == 1 else texts
        return json_response({"prompt": text, "text": text})

    async def flush_cache(self) -> Response:
        await self.worker.ask(lambda engine: engine.flush_cache())
        return json_response({"success": True, "message": "Prefixes that no running request uses are forgotten."})

    async def abort_request(self, request: Request) -> Response:
        """What it names is a request's rid, its X-Request-Id or its answer's id."""
        asked = await self.service.asked(AbortRequest, request)
        if not (asked.rid or asked.abort_all):
            raise RequestError("rid is missing: name a request, or set abort_all.", "rid")
        return json_response({"aborted": self.worker.abort(None if asked.abort_all else asked.rid)})

    async def parse_function_call(self, request: Request) -> Response:
        asked = await self.service.asked(ParseCallRequest, request)
        parser = OutputParser(thinking=False, reasoning=False, tools=asked.tools or [])
        message = await asyncio.to_thread(_parsed, asked.text, parser)
        calls = [{"name": name, "parameters": arguments} for name, arguments in message.calls or ()]
        return json_response({"normal_text": message.content, "calls": calls})

    async def separate_reasoning(self, request: Request) -> Response:
        asked = await self.service.asked(SeparateRequest, request)
        parser = OutputParser(thinking=True, reasoning=True, tools=None)
        message = await asyncio.to_thread(_parsed, asked.text, parser)
        return json_response({"reasoning_text": message.reasoning, "text": message.content})

    async def model_info(self) -> Response:
        flags = await self.worker.ask(settled)
        names = ("model_path", "model_type", "context_length")
        more = {"tokenizer_path": flags["model_path"], "is_generation": True, "preferred_sampling_params": None}
        return json_response({name: flags[name] for name in names} | more)

    async def server_info(self) -> Response:
        flags, state = await self.worker.ask(lambda engine: (settled(engine), snapshot(engine)))
        own = dataclasses.asdict(self.service.config)
        own["api_key"] = None if own["api_key"] is None else "set"
        told = {"version": __version__, "served_model_name": self.service.model, "internal_states": [state]}
        return json_response(own | flags | told)

    async def health_generate(self) -> Response:
        """Whether a token can be made now."""
        probe = SamplingParams(max_tokens=1, temperature=0.0)
        try:
            await asyncio.wait_for(self._one_token(probe), PROBE_SECONDS)
        except asyncio.TimeoutError:
            return json_response({"status": "busy", "message": f"No token came in {PROBE_SECONDS:g} s."}, 503)
        except GenerationFailed as error:
            return json_response({"status": "failed", "message": str(error)}, 503)
        return json_response({"status": "ok"})

    async def _one_token(self, params: SamplingParams) -> None:
        generation = await self.worker.submit([[0]], params)
        try:
            async for _ in generation.events():
                pass
        finally:
            self.worker.close(generation)

    async def prometheus(self) -> Response:
        if self.worker.state == "ready":
            with suppress(asyncio.TimeoutError):  # in a long step: what it told last
                self.metrics.snapshot = await asyncio.wait_for(self.worker.ask(snapshot), SCRAPE_SECONDS)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


def _parsed(text: str, parser: OutputParser) -> ParsedMessage:
    message = ParsedMessage()
    message.add(parser.feed(text) + parser.finish())
    return message
