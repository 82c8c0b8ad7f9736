"""Drafts the tokens that may come next, with the MTP layer.

After a step the true hidden state of every computed position is known, and the token after it: from both the MTP layer
makes its key for that position, for prompts and answers alike, so that prefixes that are reused can be drafted after.
For a sequence that decodes, the last of these positions gives the first draft; each further one comes from the MTP
layer's own output. The next step computes the drafts behind the drawn token and keeps those that the sampler draws too
(scheduler.commit): what is drafted changes no token. Keys of drafts that were wrong are overwritten later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from torch import Tensor

from hetero_glm5.core import Batch, Sequence
from hetero_glm5.engine.batch import BatchTensors
from hetero_glm5.engine.draft_depth import DraftDepth
from hetero_glm5.engine.sampler import greatest
from hetero_glm5.model.moe import Experts
from hetero_glm5.model.mtp import MTP
from hetero_glm5.model.state import Cache, Clocked, Rows

TOGETHER = 64  # rows whose keys are made together at the latest

Grow = Callable[[Sequence, int], bool]  # gives a sequence pages for so many tokens, if there are any


@dataclass(frozen=True)
class Computed:
    """What a step computed: for each of its chunks the sequence and the position of the first row; the rows; their
    hidden states [T, hidden]; Batch.decodes."""

    chunks: list[tuple[Sequence, int]]
    rows: Rows
    hidden: Tensor
    decodes: bool

    @staticmethod
    def of(batch: Batch, rows: Rows, hidden: Tensor) -> Computed:
        chunks = [(chunk.seq, chunk.start) for chunk in batch.chunks]
        return Computed(chunks, rows, hidden, batch.decodes)


class Drafter:
    """`depth`: how many drafts pay. `grow`: the prefix cache's."""

    def __init__(self, mtp: MTP, experts: Experts, cache: Cache, tensors: BatchTensors, depth: DraftDepth):
        self.mtp, self.experts, self.cache, self.tensors, self.depth = mtp, experts, cache, tensors, depth
        self._following: list[int] = []  # of the rows whose keys are to be made, the tokens after them,
        self._places: list[Tensor] = []  # positions and slots [2, rows], on the CPU,
        self._hidden: list[Tensor] = []  # and hidden states [rows, hidden]

    @torch.inference_mode()
    def draft(self, step: Computed, grow: Grow, context_length: int) -> None:
        """Sets `drafts` of the sequences that decode next. Call it after the step was committed, before the next is
        scheduled."""
        known = _known(step)
        seqs = [seq for seq in known if seq.decoding]
        wanted = self.depth.choose(len(seqs)) if seqs else 0
        if wanted:
            self.catch_up(step.rows.clock)  # what earlier steps left is no part of the drafts' cost
        started = time.perf_counter()
        todo = {}
        for seq in seqs:
            seq.drafts = ()
            count = min(wanted, _useful(seq, context_length))
            if count > 0 and grow(seq, len(seq.tokens) - 1 + count):
                todo[seq] = count
        self._note(step, known, todo)
        if todo:
            self._draft(step, {seq: known[seq][-1] for seq in todo}, todo)
            if step.decodes:  # else it makes a prompt's keys too
                self.depth.drafted(len(todo), max(todo.values()), time.perf_counter() - started)

    def _draft(self, step: Computed, last: dict[Sequence, int], todo: dict[Sequence, int]) -> None:
        """todo[seq] drafts for each sequence, from the hidden state in row last[seq] of the step."""
        seqs, state = list(todo), step.hidden[list(last.values())]
        for number in range(max(todo.values())):
            kept = [i for i, seq in enumerate(seqs) if todo[seq] > number]
            if len(kept) < len(seqs):
                seqs, state = [seqs[i] for i in kept], state[kept]
            rows = self.tensors.place(
                [(seq, len(seq.tokens) - 2 + number, [(seq.tokens[-1], *seq.drafts)[-1]]) for seq in seqs],
                step.rows.clock,
            )
            state = self.mtp.forward(state, rows, self.cache, self.experts, self._take_noted(step.rows.clock))
            for seq, drafts in zip(seqs, greatest(self.mtp.model.logits(state)).tolist(), strict=True):
                seq.drafts += tuple(drafts)

    def _note(self, step: Computed, known: dict[Sequence, range], drafting: Container[Sequence]) -> None:
        """Notes the known rows, but for the last one of a sequence that is drafted for: drafting makes its key, and
        those that are noted. While nothing is drafted and nothing ends, several steps' are made together."""
        kept: list[int] = []
        ended = False
        for seq, first in step.chunks:
            rows = known.get(seq, range(0))
            rows = rows[: len(rows) - (seq in drafting)]
            kept += rows
            self._following += seq.tokens[first + 1 : first + 1 + len(rows)]
            ended = ended or not seq.decoding
        if kept:
            count = len(step.hidden)
            if len(kept) == count:
                self._places.append(self.tensors.places[:, :count].clone())
                self._hidden.append(step.hidden)
            else:
                at = torch.tensor(kept)
                self._places.append(self.tensors.places[:, at])
                self._hidden.append(step.hidden[at.to(step.hidden.device)])
        if not drafting and (ended or len(self._following) >= TOGETHER):
            self.catch_up(step.rows.clock)

    def catch_up(self, clock: Clocked) -> None:
        """Makes the keys of the rows that were noted. (Should a row's page have gone to another sequence meanwhile,
        that one's drafts may be worse for it; no token depends on these keys.)"""
        if noted := self._take_noted(clock):
            self.mtp.remember(*noted, self.cache)

    def _take_noted(self, clock: Clocked) -> tuple[Tensor, Rows] | None:
        """The arguments of MTP.remember."""
        if not self._following:
            return None
        hidden = torch.cat(self._hidden)
        positions, slots = torch.cat(self._places, 1).to(hidden.device)
        tokens = torch.tensor(self._following, device=hidden.device)
        self._following, self._places, self._hidden = [], [], []
        return hidden, Rows(tokens, positions, slots, segments=[], clock=clock)


def _known(step: Computed) -> dict[Sequence, range]:
    """Of each sequence of the step the rows whose next token is known: not those of drafts that were wrong."""
    known = {}
    for (seq, first), segment in zip(step.chunks, step.rows.segments, strict=True):
        count = min(segment.stop - segment.start, len(seq.tokens) - 1 - first)
        if count > 0 and seq.finish_reason != "error":
            known[seq] = range(segment.start, segment.start + count)
    return known


def _useful(seq: Sequence, context_length: int) -> int:
    """How many drafts can at most become tokens."""
    room = context_length - len(seq.tokens)
    if seq.params.max_tokens is not None:
        room = min(room, seq.params.max_tokens - seq.num_output)
    return room - 1
