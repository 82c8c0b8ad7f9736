"""What a forward pass works on besides weights: the step's rows and the cache they read and write."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hetero_glm5.core import no_clock
from hetero_glm5.model.host_step import HostStep
from hetero_glm5.model.key_store import KeyFormat, KeyStore, key_format, row_bytes
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops

Clocked = Callable[[str], AbstractContextManager[None]]  # core.Clock or core.no_clock
Weights = Callable[[str], Tensor]  # a checkpoint's tensor by name, on the model's device and in its type


@dataclass(frozen=True)
class Segment:
    """Rows start:stop of the step are the last of the S positions of one sequence, which lie in cache slots `context`
    [S], from position 0 on."""

    start: int
    stop: int
    context: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Rows:
    """T rows: decode rows and prefill chunks of several sequences, one after the other. Behind them come, where a call
    allows for it, rows of no segment: only their keys are cached."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], within the row's sequence
    slots: Tensor  # int64 [T], where the row's keys go in the cache
    segments: list[Segment]
    clock: Clocked = no_clock

    @property
    def attending(self) -> int:
        """How many are in segments."""
        return self.segments[-1].stop if self.segments else 0

    def followed_by(self, others: Rows) -> Rows:
        """These, and behind them rows of no segment."""
        ids, positions = (self.token_ids, others.token_ids), (self.positions, others.positions)
        slots = torch.cat((self.slots, others.slots))
        return Rows(torch.cat(ids), torch.cat(positions), slots, self.segments, self.clock)


@dataclass(frozen=True)
class Group:
    """B consecutive segments of R rows each, computed together, and what they see. A context shorter than the longest
    is filled up with its own first slot, which is hidden there. long: an indexer chooses, as there are more positions
    than a row attends to."""

    rows: slice
    shape: tuple[int, int]  # B, R
    seen: ops.Seen
    long: bool

    @staticmethod
    def of(segments: list[Segment], positions: Tensor, long: bool) -> Group:
        rows, count = slice(segments[0].start, segments[-1].stop), len(segments)
        shape = count, (rows.stop - rows.start) // count
        context = segments[0].context[None]
        if shape == (1, 1):
            return Group(rows, shape, ops.Seen(context, None), long)
        if count > 1:
            padded = pad_sequence([segment.context for segment in segments], batch_first=True, padding_value=-1)
            context = torch.where(padded < 0, padded[:, :1], padded)
        return Group(rows, shape, ops.Seen(context, positions[rows].view(shape)), long)

    def __call__(self, x: Tensor) -> Tensor:
        """The group's part of x [T, ...], as [B, R, ...]."""
        return x[self.rows].view(*self.shape, *x.shape[1:])


Selection = list[Tensor | None]  # for each group: slots [B, R, index_topk], or None for "all of them"


@dataclass(frozen=True)
class Step:
    """The rows with all that a model's layers share. host: chooses and attends in place of the groups, which are then
    none. long: there are rows for which an indexer chooses."""

    rows: Rows
    rotation: Tensor  # of ops.rotations
    groups: list[Group]
    host: HostStep | None
    long: bool

    @staticmethod
    def of(rows: Rows, config: ModelConfig, host: HostStep | None = None) -> Step:
        def kind(segment: Segment) -> tuple[bool, int, int]:
            """Contexts of a kind differ by less than a factor of two, so that no more than half is filling."""
            length = len(segment.context)
            return length > config.index_topk, segment.stop - segment.start, length.bit_length()

        kinds = () if host is not None else groupby(rows.segments, kind)
        groups = [Group.of(list(same), rows.positions, long) for (long, *_), same in kinds]
        rotation = ops.rotations(rows.positions, config.qk_rope_head_dim, config.rope_theta)
        return Step(rows, rotation, groups, host, any(kind(segment)[0] for segment in rows.segments))


@dataclass(frozen=True)
class Cache:
    """The KV pool: for each layer the latents with their rotated keys, and, where the layer has an indexer, its keys.
    Page p is the slots from p·page_size on, in all of them."""

    latent: list[KeyStore]
    index: list[KeyStore | None]

    @staticmethod
    def allocate(config: ModelConfig, slots: int, *, dtype: str, device: str, mtp: bool = False) -> Cache:
        """dtype: one of the names that config.KV_DTYPES settles on."""
        latent, index = _formats(config, dtype, mtp)
        return Cache(
            [KeyStore(format, slots, device) for format in latent],
            [format and KeyStore(format, slots, device) for format in index],
        )

    @property
    def stores(self) -> list[KeyStore]:
        return [*self.latent, *(store for store in self.index if store is not None)]

    def page_bytes(self, page_size: int) -> int:
        return page_size * sum(row_bytes(store.format) for store in self.stores)

    def read_pages(self, pages: list[int], page_size: int) -> Tensor:
        """uint8 [n, page_bytes] on the cache's device, a copy: of each page its slots in all layers' latents, then in
        all layers' indexer keys."""
        at = torch.tensor(pages, dtype=torch.int64, device=self.latent[0].rows.device)
        return torch.cat([F.embedding(at, store.pages(page_size)) for store in self.stores], -1)

    def write_pages(self, pages: list[int], data: Tensor) -> None:
        """What read_pages gave, from any device, into `pages`, no two alike."""
        device = self.latent[0].rows.device
        at, data = torch.tensor(pages, dtype=torch.int64, device=device), data.to(device)
        page_size = data.shape[1] // self.page_bytes(1)
        views = [store.pages(page_size) for store in self.stores]
        unit = torch.int64 if page_size % 8 == 0 else torch.uint8  # what is copied at a time, if not a byte
        for view, part in zip(views, data.split([view.shape[1] for view in views], -1), strict=True):
            view.view(unit).index_copy_(0, at, part.view(unit))

    def copy_slots(self, pairs: list[tuple[int, int, int]]) -> None:
        """Copies (first source slot, first target slot, how many); all are read before any is written."""
        device = self.latent[0].rows.device
        sources = torch.tensor([a + i for a, _, count in pairs for i in range(count)], dtype=torch.int64, device=device)
        targets = torch.tensor([b + i for _, b, count in pairs for i in range(count)], dtype=torch.int64, device=device)
        for store in self.stores:
            store.rows.index_copy_(0, targets, store.rows.index_select(0, sources))


def cache_bytes_per_token(config: ModelConfig, dtype: str, mtp: bool = False) -> int:
    """Bytes one cached token takes over all layers (GLM-5 in BF16: 109,824; dtype as for Cache.allocate)."""
    latent, index = _formats(config, dtype, mtp)
    return sum(row_bytes(format) for format in (*latent, *index) if format is not None)


def _formats(config: ModelConfig, dtype: str, mtp: bool) -> tuple[list[KeyFormat], list[KeyFormat | None]]:
    """Of the latents and of the indexer's keys, for each layer."""
    layers = range(config.num_hidden_layers + mtp)
    latent = key_format(dtype, config.kv_lora_rank, config.qk_rope_head_dim)
    index = key_format(dtype, config.index_head_dim, 0)
    return [latent for _ in layers], [index if config.has_indexer(i) else None for i in layers]


def activation_bytes(config: ModelConfig, dtype: torch.dtype, rows: int) -> int:
    """About what a step of `rows` rows holds beside weights and cache: the widest tensors of a layer (queries, absorbed
    queries, mixed latents, each once more while they are made), and the blocks of ops.reference."""
    queries = config.num_attention_heads * (config.qk_head_dim + 2 * config.latent_dim + config.kv_lora_rank)
    hidden = 6 * config.hidden_size + 2 * config.intermediate_size
    return rows * 2 * (queries + hidden) * dtype.itemsize + 4 * 4 * ops.BLOCK_ELEMENTS
