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
_LINE = 8  # columns of INT4 that choose a book together


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


def quantize_int4(weight: Tensor, group: int, books: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """[N, K] float -> codes uint8 [N, K], 0..15, fp16 scales [N, ceil(K/group)], choices uint8 [N, ceil(K/8)], 0..3;
    w = books[choice][code] * scale.

    books: up to four of 16 entries, ascending; every 8 columns of a row choose one. Scales and choices are searched as
    csrc/kernel/quantize.h says, with the same products and sums in the same order.
    """
    columns = _columns(weight, group)
    tables = torch.tensor(books, dtype=torch.float32).view(-1, _C.BOOK_ENTRIES)
    extreme = torch.zeros_like(columns[0])
    for column in columns:
        extreme = torch.where(column.abs() > extreme.abs(), column, extreme)
    best = (torch.zeros_like(extreme),) * 2  # score, scale
    for position in _C.INT4_EXTREMES:
        best = _better(best, columns, tables, -tables[0, 0] * torch.tensor(position) / extreme)
    for _ in range(_C.INT4_REFINEMENTS):
        best = _better(best, columns, tables, 1 / best[1])
    scales = best[1].clamp(-_HALF_MAX, _HALF_MAX).half()
    inverse = 1 / scales.float()
    choices, codes = [], []
    for line in columns.split(_LINE):
        choices.append(_fit_line(line, tables, inverse)[2])
        codes += [_nearest(column * inverse, tables[choices[-1]]) for column in line]
    rows, cols = weight.shape
    whole = [torch.stack(parts, -1).reshape(rows, -1) for parts in (codes, choices)]
    return whole[0][:, :cols].to(torch.uint8), scales, whole[1][:, : -(-cols // _LINE)].to(torch.uint8)


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
    """values [N, groups], table [16] or [N, groups, 16] -> int64, how many midpoints each exceeds; NaN exceeds none."""
    middles = (table[..., :-1] + table[..., 1:]) * 0.5
    return sum((values > middles[..., i]).long() for i in range(middles.shape[-1]))


def _fit_line(line: Tensor, tables: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w.b, b.b and the number of the book whose entries b are nearest to w * inverse, for the 8 columns of a line."""
    best = least = None
    for number, table in enumerate(tables):
        wb, bb = torch.zeros_like(inverse), torch.zeros_like(inverse)
        for column in line:
            entry = table[_nearest(column * inverse, table)]
            wb, bb = wb + column * entry, bb + entry * entry
        loss = bb - 2 * (inverse * wb)
        found = (wb, bb, torch.full_like(inverse, number, dtype=torch.int64))
        if best is None:
            best, least = found, loss
        else:
            best = tuple(torch.where(least > loss, new, old) for new, old in zip(found, best, strict=True))
            least = torch.where(least > loss, loss, least)
    return best


def _better(best: tuple[Tensor, ...], columns: Tensor, tables: Tensor, inverse: Tensor) -> tuple[Tensor, ...]:
    """(score, scale), updated where the entries nearest to columns * inverse leave a smaller error."""
    wb, bb = torch.zeros_like(inverse), torch.zeros_like(inverse)
    for line in columns.split(_LINE):
        line_wb, line_bb, _ = _fit_line(line, tables, inverse)
        wb, bb = wb + line_wb, bb + line_bb
    score = wb * wb / bb
    return tuple(torch.where(score > best[0], new, old) for new, old in zip((score, wb / bb), best, strict=True))
