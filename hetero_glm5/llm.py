"""LLM: the engine in this process, without a server."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import Drawn, FinishReason, RequestError, SamplingParams, Sequence, UserError
from hetero_glm5.engine.engine import Engine
from hetero_glm5.flags import ConfigError, nearest_flag
from hetero_glm5.model_config import DEMO, ModelConfig, checkpoint_folder
from hetero_glm5.server.tokenizer import Tokenizer

Prompt = str | list[int]


@dataclass(frozen=True)
class Output:
    """What was generated for one prompt; `text` is None without a tokenizer."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    num_cached: int = 0  # tokens of the prompt that were known
    logprobs: list[Drawn] | None = None  # of each token, with SamplingParams.logprobs
    prompt_logprobs: list[Drawn] | None = None  # of each prompt token but the first


class LLM:
    """LLM(path="demo", device="auto", dtype="bfloat16", skip_tokenizer=False, **flags); `path` is a checkpoint folder,
    or "demo" for the packaged model; `flags` are EngineConfig fields, such as kt_num_gpu_experts=5 or
    chunked_prefill_size=17. A context manager. Raises UserError."""

    def __init__(
        self,
        path: str = DEMO,
        *,
        device: str = "auto",
        dtype: str = "bfloat16",
        skip_tokenizer: bool = False,
        **flags: Any,
    ):
        if not isinstance(path, str | os.PathLike):
            raise ConfigError(f"path is {path!r}; it must be a checkpoint folder.")
        known = [f.name for f in dataclasses.fields(EngineConfig) if f.name not in ("model", "device", "dtype")]
        for name in flags:
            if name not in known:
                raise ConfigError(nearest_flag(name, known))
        path = str(checkpoint_folder(path))
        ModelConfig.load(path)  # so that a folder that is no checkpoint is told as that, not as a missing tokenizer
        self.tokenizer = None if skip_tokenizer else Tokenizer.from_folder(path)
        config = EngineConfig(model=path, device=device, dtype=dtype, **flags)
        self.engine = Engine.load(config, tokenizer=self.tokenizer)
        self._closed = False
        self._turn = threading.Lock()

    def generate(
        self, prompts: Prompt | list[Prompt], params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Output]:
        """Generates for one prompt (text or token ids) or a list of them; one Output each, in order, or params.n of
        them. `params` for all, or one for each. Raises RequestError."""
        many = _as_list(prompts)
        each = params if isinstance(params, list) else [params or SamplingParams()] * len(many)
        if len(each) != len(many) or not all(isinstance(p, SamplingParams) for p in each):
            raise RequestError(f"{len(many)} prompts need one SamplingParams, or a list of {len(many)}.", "params")
        todo = deque((self._encode(prompt), p) for prompt, p in zip(many, each, strict=True))
        with self._alone():
            return self._generate(todo)

    def _generate(self, todo: deque[tuple[list[int], SamplingParams]]) -> list[Output]:
        seqs: list[Sequence] = []
        texts: dict[int, str] = {}
        drawn: dict[int, list[Drawn]] = {}
        try:
            while todo or self.engine.busy:
                while todo and self._fits(todo[0][1].n):
                    seqs += self.engine.add_all(*todo.popleft())
                for event in self.engine.step():
                    texts[event.seq.id] = texts.get(event.seq.id, "") + event.text
                    if event.error is not None:
                        raise RuntimeError(event.error)
                    if event.drawn is not None and event.seq.params.logprobs is not None:
                        drawn.setdefault(event.seq.id, []).append(event.drawn)
        finally:
            for seq in seqs:
                self.engine.abort(seq)  # does nothing to finished ones
        return [
            Output(
                seq.tokens[: seq.num_prompt],
                seq.output,
                None if self.tokenizer is None else texts[seq.id],
                seq.finish_reason or "abort",
                seq.num_cached or 0,
                drawn.get(seq.id),
                seq.prompt_logprobs,
            )
            for seq in seqs
        ]

    def _fits(self, count: int) -> bool:
        """Whether so many more can wait, or never could."""
        most = self.engine.config.max_queued_requests
        return self.engine.num_waiting + count <= most or count > most

    def logits(self, token_ids: list[int]) -> Tensor:
        """fp32 [T, vocab]: the logits after every token, computed through the engine's own chunked path."""
        with self._alone():
            seq = self.engine.add(token_ids, SamplingParams(max_tokens=1, temperature=0.0), logits=True)
            try:
                while not seq.finished:
                    for event in self.engine.step():
                        if event.error is not None:
                            raise RuntimeError(event.error)
            finally:
                self.engine.abort(seq)  # does nothing to a finished one
            return torch.cat(seq.logits or [])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread drives an engine, and only while it is open."""
        if self._closed:
            raise UserError("this LLM is closed; make a new one.")
        if not self._turn.acquire(blocking=False):
            raise UserError("another thread is using this LLM; give it all prompts in one call, or use the server.")
        try:
            yield
        finally:
            self._turn.release()

    def close(self) -> None:
        self._closed = True
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, list):
            return prompt  # the engine checks the ids
        if not isinstance(prompt, str):
            raise RequestError(f"a prompt is {prompt!r}; it must be text or a list of token ids.", "prompt")
        if self.tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer; this LLM was made with skip_tokenizer=True.", "prompt")
        return self.tokenizer.encode(prompt)


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str) or (isinstance(prompts, list) and prompts and type(prompts[0]) is int):
        return [prompts]
    if not isinstance(prompts, list):
        raise RequestError(
            f"prompts is {type(prompts).__name__}; it must be text, token ids, or a list of them.", "prompt"
        )
    return prompts
