"""The same weights in transformers: `generate`, greedy, as fast as its own settings make it here."""

from __future__ import annotations

import itertools
import time

import torch
from torch import Tensor
from transformers import GlmMoeDsaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()  # it reports every tensor of the MTP layer, which it does not know
logging.disable_progress_bar()

EXPERTS = ("eager", "batched_mm", "grouped_mm")
CACHES = ("dynamic", "static")
TRIALS = 3


class Arrivals:
    """A streamer that notes when tokens come; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Generate:
    """A model with one choice of settings."""

    def __init__(self, model: GlmMoeDsaForCausalLM, experts: str, cache: str):
        self.model, self.experts, self.cache = model, experts, cache
        self.name, self.dtype = f"transformers ({experts}, {cache})", str(model.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        """`new` tokens for each of the prompts, which are of one length, and the seconds from the first ones on."""
        self.model.set_experts_implementation(self.experts)
        arrivals, ids = Arrivals(), torch.tensor(prompts, device=self.model.device)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation=None if self.cache == "dynamic" else self.cache,
            streamer=arrivals,
        )
        return output[:, ids.shape[1] :].tolist(), arrivals.times[-1] - arrivals.times[1]


def fastest(folder: str, dtype: str, device: str, prompts: list[list[int]], new: int) -> Generate:
    """The quickest of the settings for such prompts."""
    model = GlmMoeDsaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.to(device).eval()
    model.generation_config.eos_token_id = None  # min_new_tokens would mask it at each step
    model.generation_config.temperature = model.generation_config.top_p = None
    peers = [Generate(model, experts, cache) for experts, cache in itertools.product(EXPERTS, CACHES)]
    for peer in peers:
        peer.decode(prompts, 4)  # warms up
    return min(peers, key=lambda peer: min(peer.decode(prompts, new)[1] for _ in range(TRIALS)))
