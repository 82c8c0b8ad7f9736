"""One MoE layer's random experts, tokens and routing, from a seed: the same numbers in every process that asks.

Needs torch only, because peers run in an environment of their own. Only DISTINCT experts differ: expert e has the
weights of expert e % DISTINCT in memory of its own, which takes a kernel as long as others would and spares generating
and quantising billions of them. Tokens and routing of call `draw` differ from those of any other, so that few calls
find in a cache what the one before has read.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

DISTINCT = 4
SCALE = 0.02  # standard deviation of the weights
OUTLIER_SHARE, OUTLIER_FACTOR = 0.005, 20  # of input columns, each matrix its own; how many times as large they are
REFERENCE_ROWS = 4  # rows of draw 0 whose exact result is known

Weights = tuple[Tensor, Tensor, Tensor]  # gate [I, H], up [I, H], down [H, I]


@dataclasses.dataclass(frozen=True)
class MoeCase:
    """hidden (H), intermediate (I), experts (E) and topk of one layer. outliers: some input columns are large."""

    hidden: int
    intermediate: int
    experts: int
    topk: int
    seed: int = 0
    outliers: bool = False

    @cached_property
    def distinct(self) -> list[Weights]:
        """float32 weights of the experts that differ."""
        return [self._weights(e) for e in range(min(DISTINCT, self.experts))]

    def weights(self, expert: int) -> Weights:
        return self.distinct[expert % len(self.distinct)]

    def _weights(self, expert: int) -> Weights:
        generator = torch.Generator().manual_seed(1000 * self.seed + expert)
        shapes = ((self.intermediate, self.hidden),) * 2 + ((self.hidden, self.intermediate),)
        gate, up, down = (torch.randn(shape, generator=generator) * SCALE for shape in shapes)
        if self.outliers:
            for matrix in (gate, up, down):
                columns = torch.randperm(matrix.shape[1], generator=generator)
                matrix[:, columns[: max(1, round(OUTLIER_SHARE * len(columns)))]] *= OUTLIER_FACTOR
        return gate, up, down

    def tokens(self, rows: int, draw: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [rows, H] bfloat16, ids [rows, k] int64 without repetition in a row, weights [rows, k] float32."""
        generator = torch.Generator().manual_seed(1000 * self.seed + 500 + draw)
        blocks = [self._rows(REFERENCE_ROWS, generator)]  # the same whatever `rows`
        if rows > REFERENCE_ROWS:
            blocks.append(self._rows(rows - REFERENCE_ROWS, generator))
        x, ids, weights = (torch.cat(parts)[:rows].contiguous() for parts in zip(*blocks, strict=True))
        return x, ids, weights

    def _rows(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.rand(rows, self.experts, generator=generator).argsort(1)[:, : self.topk]
        weights = torch.rand(rows, self.topk, generator=generator) + 0.5
        x = torch.randn(rows, self.hidden, generator=generator).bfloat16()
        return x, ids, weights / weights.sum(1, keepdim=True)

    @cached_property
    def reference(self) -> Tensor:
        """float32 [REFERENCE_ROWS, H]: the layer's result for the first rows of draw 0, with unquantised weights."""
        x, ids, weights = self.tokens(REFERENCE_ROWS, draw=0)
        y = torch.zeros(REFERENCE_ROWS, self.hidden)
        for row in range(REFERENCE_ROWS):
            for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
                gate, up, down = self.weights(expert)
                hidden = F.silu(gate @ x[row].float()) * (up @ x[row].float())
                y[row] += weight * (down @ hidden)
        return y

    def error(self, y: Tensor) -> float:
        """||y - reference|| / ||reference|| of the first rows of a result for draw 0."""
        rows = min(len(y), REFERENCE_ROWS)
        exact = self.reference[:rows]
        return float((y[:rows].float() - exact).norm() / exact.norm())
