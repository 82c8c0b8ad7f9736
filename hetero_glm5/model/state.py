"""What a forward pass works on besides weights: the step's rows and the cache they read and write."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from hetero_glm5.core import no_clock
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops.reference import BLOCK_ELEMENTS

Clocked = Callable[[str], AbstractContextManager[None]]  # core.Clock or core.no_clock
Weights = Callable[[str], Tensor]  # a checkpoint's tensor by name, on the model's device and in its type


@dataclass(frozen=True)
class Segment:
    """Rows start:stop of the step are the last of one sequence's S cached positions, which lie in cache slots `context`
    [S]."""

    start: int
    stop: int
    context: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Rows:
    """T rows: decode rows and prefill chunks of several sequences, one after the other."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], within the row's sequence
    slots: Tensor  # int64 [T], where the row's keys go in the cache
    segments: list[Segment]
    clock: Clocked = no_clock


@dataclass(frozen=True)
class Cache:
    """The KV pool: for each layer the latents with their rotated keys [slots, c + r], and, where the layer has an
    indexer, its keys [slots, index_head_dim]. Slots hold anything until a row is written there."""

    latent: list[Tensor]
    index: list[Tensor | None]

    @staticmethod
    def allocate(config: ModelConfig, slots: int, *, dtype: torch.dtype, device: str, mtp: bool = False) -> Cache:
        layers = range(config.num_hidden_layers + mtp)
        return Cache(
            latent=[torch.empty(slots, config.latent_dim, dtype=dtype, device=device) for _ in layers],
            index=[
                torch.empty(slots, config.index_head_dim, dtype=dtype, device=device) if config.has_indexer(i) else None
                for i in layers
            ],
        )


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype, mtp: bool = False) -> int:
    """Bytes one cached token takes over all layers (GLM-5 in BF16: 109,824)."""
    layers = range(config.num_hidden_layers + mtp)
    values = sum(config.latent_dim + (config.index_head_dim if config.has_indexer(i) else 0) for i in layers)
    return values * dtype.itemsize


def activation_bytes(config: ModelConfig, dtype: torch.dtype, rows: int) -> int:
    """About what a step of `rows` rows holds beside weights and cache: the widest tensors of a layer (queries, absorbed
    queries, mixed latents, each once more while they are made), and the blocks of ops.reference."""
    queries = config.num_attention_heads * (config.qk_head_dim + 2 * config.latent_dim + config.kv_lora_rank)
    hidden = 6 * config.hidden_size + 2 * config.intermediate_size
    return rows * 2 * (queries + hidden) * dtype.itemsize + 4 * 4 * BLOCK_ELEMENTS
