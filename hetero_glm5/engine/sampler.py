"""Chooses each row's token: greedy, or temperature, then top-k, then top-p, then one draw by inverting the CDF.

The draw's uniform number comes from a counter-based generator keyed by the sequence's seed and the position, so that a
seeded request gives the same tokens whatever else is in the batch and however it was chunked or preempted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hetero_glm5.core import Batch, Sequence
from hetero_glm5.engine.scheduler import INVALID_TOKEN


def sample(logits: Tensor, batch: Batch) -> list[int | None]:
    """logits fp32 [rows that draw, vocab]. Returns a token for each chunk of the batch, None where none is due and
    INVALID_TOKEN where the logits are not finite."""
    best, greedy = logits.max(-1)
    finite, greedy_ids = best.isfinite().tolist(), greedy.tolist()
    tokens: list[int | None] = []
    row = 0
    for chunk in batch.chunks:
        if not chunk.samples:
            tokens.append(None)
            continue
        if not finite[row]:
            tokens.append(INVALID_TOKEN)
        elif chunk.seq.params.temperature == 0:
            tokens.append(greedy_ids[row])
        else:
            tokens.append(draw(logits[row], chunk.seq))
        row += 1
    return tokens


def draw(logits: Tensor, seq: Sequence) -> int:
    """One token from logits [vocab] under the sequence's temperature, top_k and top_p."""
    params = seq.params
    top_k = min(params.top_k or len(logits), len(logits))
    values, ids = logits.topk(top_k) if top_k < len(logits) else logits.sort(descending=True, stable=True)
    chances = (values / params.temperature).double().softmax(0)
    before = chances.cumsum(0) - chances  # probability of everything likelier
    chances = chances.masked_fill(before >= params.top_p, 0)  # the first always stays
    total = chances.cumsum(0)
    at = torch.searchsorted(total, uniform(seq) * total[-1], right=True)
    return int(ids[at.clamp(max=int(chances.count_nonzero()) - 1)])


def uniform(seq: Sequence) -> float:
    """In [0, 1), a function of the sequence's seed and the position to be drawn alone."""
    return float(np.random.Generator(np.random.Philox(key=seq.seed, counter=len(seq.tokens))).random())
