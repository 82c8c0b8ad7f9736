"""A scheduled batch as tensors: which tokens, at which positions, into which cache slots.

Their memory is kept from step to step. Each running sequence has a row of a table on the device that says where its
positions lie in the cache; a row is written when the sequence gets pages, not for every token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import Batch, Sequence
from hetero_glm5.model.state import Clocked, Rows, Segment


def decoded_rows(batch: Batch) -> Tensor:
    """bool [T], on the CPU: which of the batch's rows are decoded, not prefilled."""
    if batch.decodes:
        return torch.ones(sum(chunk.num_rows for chunk in batch.chunks), dtype=torch.bool)
    counts = torch.tensor([chunk.num_rows for chunk in batch.chunks])
    return torch.tensor([chunk.decodes for chunk in batch.chunks]).repeat_interleave(counts)


class BatchTensors:
    """Of a settled config. One batch at a time: the next one's tensors take the place of this one's, so the device must
    be done with them."""

    def __init__(self, config: EngineConfig, most_rows: int, context_length: int):
        device, page_size, most_sequences = config.device, config.page_size, config.max_running_requests
        self.device, self.page_size = device, page_size
        pages = -(-context_length // page_size)
        self._table = torch.empty(most_sequences, pages, page_size, dtype=torch.int64, device=device)
        self._contexts = self._table.view(most_sequences, -1)
        self._here = torch.empty(3, most_rows, dtype=torch.int64, pin_memory=device.startswith("cuda"))
        self._staged = self._here.numpy()  # the same memory
        self._there = self._here if device == "cpu" else torch.empty_like(self._here, device=device)
        self._places: dict[Sequence, int] = {}
        self._known: list[list[int]] = [[] for _ in range(most_sequences)]  # the pages in each row of the table
        self._offsets = torch.arange(page_size, device=device)

    def context(self, seq: Sequence, length: int) -> Tensor:
        """Cache slots of the sequence's positions 0..length-1, int64 on the device."""
        place = self._places.get(seq)
        if place is None:
            place = self._places[seq] = self._free_place()
        known = self._known[place]
        if len(known) != len(seq.pages) or known != seq.pages:
            same = next((i for i, (a, b) in enumerate(zip(known, seq.pages, strict=False)) if a != b), None)
            first = min(len(known), len(seq.pages)) if same is None else same
            if first < len(seq.pages):
                starts = torch.tensor(seq.pages[first:], dtype=torch.int64).to(self.device) * self.page_size
                self._table[place, first : len(seq.pages)] = starts[:, None] + self._offsets
            self._known[place] = [*seq.pages]
        return self._contexts[place, :length]

    def _free_place(self) -> int:
        """A row of the table that no sequence with pages has."""
        if len(self._places) == len(self._known):
            for seq in [seq for seq in self._places if not seq.pages]:
                del self._places[seq]
        used = set(self._places.values())
        return next(place for place in range(len(self._known)) if place not in used)

    @property
    def places(self) -> Tensor:
        """Positions and slots of the batch's rows, int64 [2, rows], on the CPU."""
        return self._here[1:]

    def rows(self, batch: Batch, clock: Clocked) -> Rows:
        """The batch's rows: each chunk's tokens, then its drafts."""
        runs = []
        for chunk in batch.chunks:
            tokens = chunk.seq.tokens[chunk.start : chunk.start + chunk.count]
            runs.append((chunk.seq, chunk.start, [*tokens, *chunk.drafts]))
        return self.place(runs, clock)

    def place(self, runs: Iterable[tuple[Sequence, int, list[int]]], clock: Clocked) -> Rows:
        """Rows for runs of tokens: whose, the first one's position, their ids."""
        segments: list[Segment] = []
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        size = self.page_size
        for seq, first, tokens in runs:
            start, last, pages = len(ids), first + len(tokens), seq.pages
            segments.append(Segment(start, start + len(tokens), self.context(seq, last)))
            ids += tokens
            positions += range(first, last)
            slots += [pages[p // size] * size + p % size for p in range(first, last)]
        at = len(ids)
        self._staged[:, :at] = ids, positions, slots
        if self._there is not self._here:
            self._there[:, :at].copy_(self._here[:, :at], non_blocking=True)
        there = self._there[:, :at]
        return Rows(there[0], there[1], there[2], segments, clock)
