"""A symmetric INT4 weight as an imported checkpoint stores it: codes and scales, nothing rounded yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Int4Matrix:
    """W [N, K] = (code - 8) * scale. `matrix[a:b]` are rows as fp32: the products are exact there."""

    codes: Tensor  # uint8 [N, ceil(K/8) * 4], two codes a byte, the first in the low bits
    scales: Tensor  # [N, ceil(K/group)], floating point
    cols: int  # K
    group: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.codes), self.cols))

    def __getitem__(self, rows: slice) -> Tensor:
        codes, scales = self.codes[rows], self.scales[rows].float()
        values = torch.stack((codes & 15, codes >> 4), 2).flatten(1)[:, : self.cols].float().sub_(8)
        return values.mul_(scales.repeat_interleave(self.group, 1)[:, : self.cols])

    def half_scales(self, rounded: bool) -> Tensor:
        """The scales as fp16. ValueError if fp16 cannot hold one: at all, or exactly unless they may be `rounded`."""
        half = self.scales.half()
        wrong = ~half.isfinite() if rounded else ~half.isfinite() | (half.float() != self.scales.float())
        if wrong.any():
            value = self.scales[wrong][0].item()
            limit = "exactly" if abs(value) <= HALF_MAX else f"at all; its largest number is {HALF_MAX:g}"
            raise ValueError(f"a scale of {value!r}, which fp16 cannot hold {limit}")
        return half
