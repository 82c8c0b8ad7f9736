"""How cached keys lie in memory: slots, each one row of `coded` + `kept` values, in one format.

A latent row is kv_lora_rank values to code and the rotated key, which is kept in BF16 where the rest is quantised; an
indexer key is coded whole. A format is one struct: its layout (how many elements of which storage type a row takes) and
its scalar truth (encode, decode). decode gives fp32, in which attention and indexer compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_glm5 import _C

GROUP = _C.KEY_GROUP  # values under one FP8 scale
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class PlainRows:
    """The values as they are, in one floating type."""

    storage: torch.dtype
    elements: int

    def encode(self, x: Tensor) -> Tensor:
        return x.to(self.storage)

    def decode(self, rows: Tensor) -> Tensor:
        return rows.float()


@dataclass(frozen=True)
class FP8Rows:
    """`coded` values in e4m3, an fp32 scale for each 128 of them (the last group may be shorter), `kept` in BF16.

    scale = max|x| / 448 of the group, value = e4m3(x / scale), so that a value's error is at most 2^-4 of itself, or
    2^-10 · scale if that is more. GLM-5's latents take 512 + 4·4 + 64·2 = 656 B, its indexer keys 128 + 4.
    """

    coded: int
    kept: int
    storage = torch.uint8

    @property
    def groups(self) -> int:
        return -(-self.coded // GROUP)

    @property
    def elements(self) -> int:
        return self.coded + 4 * self.groups + 2 * self.kept

    def encode(self, x: Tensor) -> Tensor:
        values, kept = x.split([self.coded, self.kept], -1)
        groups = values.float().split(GROUP, -1)
        largest = torch.stack([group.abs().amax(-1) for group in groups], -1)
        scales = (largest / E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)  # NaN stays NaN
        codes = [group / scale for group, scale in zip(groups, scales.split(1, -1), strict=True)]
        parts = torch.cat(codes, -1).to(torch.float8_e4m3fn), scales, kept.to(torch.bfloat16)
        return torch.cat([part.view(torch.uint8) for part in parts], -1)

    def decode(self, rows: Tensor) -> Tensor:
        codes, scales, kept = rows.split([self.coded, 4 * self.groups, 2 * self.kept], -1)
        # By a table of the 256 codes: torch converts e4m3 five times as slowly on a CPU.
        table = torch.arange(256, dtype=torch.uint8, device=rows.device).view(torch.float8_e4m3fn).float()
        values = table.index_select(0, codes.int().flatten()).view(codes.shape)
        for group, scale in zip(values.split(GROUP, -1), _as(torch.float32, scales).split(1, -1), strict=True):
            group.mul_(scale)
        return torch.cat((values, _as(torch.bfloat16, kept).float()), -1) if self.kept else values


def _as(dtype: torch.dtype, raw: Tensor) -> Tensor:
    return raw.clone(memory_format=torch.contiguous_format).view(dtype)  # a part of a row may begin at any byte


KeyFormat = PlainRows | FP8Rows


def key_format(dtype: str, coded: int, kept: int) -> KeyFormat:
    """dtype: one of the names that config.KV_DTYPES settles on."""
    return FP8Rows(coded, kept) if dtype == "fp8_e4m3" else PlainRows(getattr(torch, dtype), coded + kept)


def row_bytes(format: KeyFormat) -> int:
    return format.elements * format.storage.itemsize


class KeyStore:
    """A pool of slots in one format. Slots hold anything until a row is written there, and nobody reads them before."""

    def __init__(self, format: KeyFormat, slots: int, device: str):
        self.format = format
        self.rows = torch.empty(slots, format.elements, dtype=format.storage, device=device)

    def write(self, slots: Tensor, x: Tensor) -> None:
        """slots int64 [T], no two alike; x [T, coded + kept]."""
        self.rows.index_copy_(0, slots, self.format.encode(x))

    def read(self, slots: Tensor) -> Tensor:
        """slots int64 [...] → fp32 [..., coded + kept]."""
        return self.format.decode(F.embedding(slots, self.rows))

    def pages(self, page_size: int) -> Tensor:
        """The store as bytes, a view: uint8 [pages, page_size · bytes of a row]."""
        whole = len(self.rows) // page_size
        return self.rows[: whole * page_size].view(torch.uint8).view(whole, -1)
