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

FEW = 1024


@torch.inference_mode()
def sample(logits: Tensor, batch: Batch, eos: tuple[int, ...] = ()) -> list[int | None]:
    """A token for each chunk of the batch, None where none is due, INVALID_TOKEN where the logits are not finite. The
    logits, fp32 [rows that draw, vocab], are changed where a sequence may not end yet (min_tokens)."""
    drawing = [chunk.seq for chunk in batch.chunks if chunk.samples]
    finite = logits.amax(-1).isfinite().tolist()
    for row, seq in enumerate(drawing):
        if seq.num_output < seq.params.min_tokens:
            logits[row, [*seq.params.stop_token_ids, *(() if seq.params.ignore_eos else eos)]] = float("-inf")
    greedy = logits.argmax(-1).tolist()
    drawn = iter(
        INVALID_TOKEN if not finite[row] else greedy[row] if seq.params.temperature == 0 else draw(logits[row], seq)
        for row, seq in enumerate(drawing)
    )
    return [next(drawn) if chunk.samples else None for chunk in batch.chunks]


def draw(logits: Tensor, seq: Sequence) -> int:
    """One token from logits [vocab] under the sequence's temperature, top_k and top_p."""
    top_k, top_p = seq.params.top_k or len(logits), seq.params.top_p
    logits = (logits.double() - logits.max()) / seq.params.temperature  # at most 0: no temperature can overflow
    if top_k < len(logits):
        logits, ids = logits.topk(top_k)
        chances = logits.softmax(0)
    elif top_p < 1:
        chances, ids = _likeliest(logits, top_p)
    else:
        chances, ids = logits.softmax(0), None
    if top_p < 1:
        before = chances.cumsum(0) - chances  # probability of everything likelier
        chances = chances.masked_fill(before >= top_p, 0)  # the first always stays
    mass = chances.cumsum(0)
    at = torch.searchsorted(mass, uniform(seq) * mass[-1], right=True)
    at = at.clamp(max=torch.searchsorted(mass, mass[-1]))  # rounding must not reach what has no chance
    return int(at if ids is None else ids[at])


def _likeliest(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities and ids of the likeliest tokens, in order, that hold at least `top_p` together. Sorting a
    vocabulary of 150,000 takes 10 ms on a CPU core, and a few tokens nearly always do."""
    values, ids = logits.topk(min(FEW, len(logits)))
    total = logits.logsumexp(0)
    chances = (values - total).exp()
    if chances.sum() < top_p and len(chances) < len(logits):
        values, ids = logits.sort(descending=True, stable=True)
        chances = (values - total).exp()
    return chances, ids


def uniform(seq: Sequence) -> float:
    """In [0, 1), a function of the sequence's seed and the position to be drawn alone."""
    return float(np.random.Generator(np.random.Philox(key=seq.seed, counter=len(seq.tokens))).random())
