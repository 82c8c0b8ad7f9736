"""The quantisers of INT8 and INT4 in torch: bit for bit the codes and scales of packing (csrc/kernel/quantize.h), and
the column scales that weights are divided by first.

A group is `group` neighbouring columns of a row. K need not be a multiple of it: the last group is then smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hetero_glm5 import _C

_HALF_MAX = 65504.0  # largest fp16 value
_MOST_EXPONENT = 6


def column_scales(gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """[I, H], [I, H], [H, I] float -> float32 powers of two [H], [I]: the column scales of csrc/format/column_scales.h.

    Quantised are gate / [H], up / [H] * [I, 1] and down / [I].
    """
    inputs = _balance(_row_sum(gate) + _row_sum(up))
    up_rows = _row_sum(up.t())
    rows = _row_sum(gate.t()) * up_rows
    hidden = _balance(torch.where(rows == 0, 0, _row_sum(down) / rows))
    for _ in range(_MOST_EXPONENT):
        moved = torch.ldexp(up_rows, 2 * hidden)
        hidden += ((hidden < 0) & (moved < up.shape[1] * 2**-14)).to(hidden.dtype)
        hidden -= ((hidden > 0) & (moved > _HALF_MAX**2)).to(hidden.dtype)
    return torch.exp2(inputs.float()), torch.exp2(hidden.float())


def quantize_int8(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """[N, K] float -> codes uint8 [N, K], fp16 scales [N, ceil(K/group)]; w = (code - 128) * scale.

    The scale is absmax / 127 of each group.
    """
    columns = _columns(weight, group)
    scales = (columns.abs().amax(0) / 127).clamp(max=_HALF_MAX).half()
    used = torch.where(scales == 0, 1.0, scales.float())
    codes = (columns / used).clamp(-127, 127).round() + 128
    return codes.to(torch.uint8).permute(1, 2, 0).reshape(len(weight), -1)[:, : weight.shape[1]], scales


def quantize_int4(weight: Tensor, group: int, books: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[N, K] float -> codes uint8 [N, K], 0..15, fp16 scales [N, ceil(K/group)]; w = book[code] * scale.

    books: four of 16 entries, ascending; the two lowest bits of a group's scale say which one it uses. Book and scale
    are searched as csrc/kernel/quantize.h says, with the same products and sums in the same order.
    """
    columns = _columns(weight, group)
    tables = torch.tensor(books, dtype=torch.float32).view(-1, _C.BOOK_ENTRIES)
    extreme = torch.zeros_like(columns[0])
    for column in columns:
        extreme = torch.where(column.abs() > extreme.abs(), column, extreme)
    best = (torch.zeros_like(extreme),) * 3  # score, scale, book
    for number, table in enumerate(tables.unique_consecutive(dim=0)):
        for position in _C.INT4_EXTREMES:
            inverse = -table[0] * torch.tensor(position, dtype=torch.float32) / extreme
            best = _better(best, columns, inverse, table.expand(*extreme.shape, -1), float(number))
    own = tables[best[2].long()]  # [N, groups, 16]
    for _ in range(_C.INT4_REFINEMENTS):
        best = _better(best, columns, 1 / best[1], own, best[2])
    scales = _scale_with_book(best[1], best[2].short())
    codes = _nearest(columns * (1 / scales.float()), own)
    return codes.to(torch.uint8).permute(1, 2, 0).reshape(len(weight), -1)[:, : weight.shape[1]], scales


def _row_sum(weight: Tensor) -> Tensor:
    """float64 [K]: the squares of the rows of [N, K], added up one row after the other."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for row in weight.double():
        total += row * row
    return total


def _balance(squares: Tensor) -> Tensor:
    """round(log2(square / median) / 4) within +-_MOST_EXPONENT, int32; 0 where either is 0."""
    ratio = squares / squares.median()
    above = torch.frexp(torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)).exponent  # floor(log2) + 1
    return ((above + 1) >> 2).clamp(-_MOST_EXPONENT, _MOST_EXPONENT)


def _columns(weight: Tensor, group: int) -> Tensor:
    """[N, K] -> float32 [group, N, ceil(K/group)]: a matrix for each place in a group, zeros after the last column."""
    rows, cols = weight.shape
    padded = weight.new_zeros((rows, -(-cols // group) * group), dtype=torch.float32)
    padded[:, :cols] = weight
    return padded.view(rows, -1, group).permute(2, 0, 1).contiguous()


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """values [..., N, groups], table [N, groups, 16] -> how many midpoints each value exceeds; NaN exceeds none."""
    middles = (table[..., :-1] + table[..., 1:]) * 0.5
    return sum((values > middles[..., i]).to(torch.uint8) for i in range(middles.shape[-1]))


def _better(best: tuple[Tensor, ...], columns: Tensor, inverse: Tensor, table: Tensor, book: Tensor | float):
    """(score, scale, book), updated where the entries nearest to columns * inverse leave a smaller error."""
    wb, bb = torch.zeros_like(inverse), torch.zeros_like(inverse)
    entries = table.gather
    for column in columns:
        b = entries(-1, _nearest(column * inverse, table).long()[..., None])[..., 0]
        wb, bb = wb + column * b, bb + b * b
    score = wb * wb / bb
    found = (score, wb / bb, torch.as_tensor(book).expand_as(score))
    return tuple(torch.where(score > best[0], new, old) for new, old in zip(found, best, strict=True))


def _scale_with_book(scale: Tensor, book: Tensor) -> Tensor:
    """The fp16 nearest to each scale whose two lowest bits are `book`; 0 stays 0."""
    bits = scale.half().view(torch.int16)
    nearest = ((bits & 0x7FFF) - book + 2 & ~3) + book
    nearest = torch.minimum(torch.maximum(nearest, book), 0x7BFC + book)
    return torch.where(scale == 0, 0, nearest | (bits & -0x8000)).view(torch.float16)
