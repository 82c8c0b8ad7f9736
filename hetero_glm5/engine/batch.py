"""A scheduled batch as tensors: which tokens, at which positions, into which cache slots."""

from __future__ import annotations

import numpy as np
import torch

from hetero_glm5.core import Batch, Sequence
from hetero_glm5.model.state import Clocked, Rows, Segment


def context_slots(seq: Sequence, length: int, page_size: int) -> np.ndarray:
    """Cache slots of the sequence's positions 0..length-1, int64."""
    pages = np.asarray(seq.pages[: -(-length // page_size)], dtype=np.int64)
    return (pages[:, None] * page_size + np.arange(page_size)).reshape(-1)[:length]


def decoded_rows(batch: Batch) -> torch.Tensor:
    """bool [T], on the CPU: which of the batch's rows are decoded, not prefilled."""
    counts = torch.tensor([chunk.count for chunk in batch.chunks])
    return torch.tensor([chunk.decodes for chunk in batch.chunks]).repeat_interleave(counts)


def to_rows(batch: Batch, page_size: int, device: str, clock: Clocked) -> Rows:
    token_ids: list[int] = []
    positions, slots, segments = [], [], []
    for chunk in batch.chunks:
        seq, first, last = chunk.seq, chunk.start, chunk.start + chunk.count
        context = context_slots(seq, last, page_size)
        segments.append(Segment(len(token_ids), len(token_ids) + chunk.count, torch.from_numpy(context).to(device)))
        token_ids += seq.tokens[first:last]
        positions.append(np.arange(first, last))
        slots.append(context[first:])
    return Rows(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        slots=torch.from_numpy(np.concatenate(slots)).to(device),
        segments=segments,
        clock=clock,
    )
