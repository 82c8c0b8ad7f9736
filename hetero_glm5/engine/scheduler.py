"""Continuous batching: which tokens of which sequences the next step computes. Plain Python, no torch.

Decode rows come first and always ride along; prompts, oldest first, take up to chunked_prefill_size tokens. A
sequence is admitted when its whole prompt fits into free pages. When a decoding sequence finds no page, the youngest
running one is preempted: it gives its pages back and is computed again later from its tokens. The oldest sequence can
always go on, because no sequence may be longer than the pool.
"""

from __future__ import annotations

from collections import deque
from itertools import count

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import Batch, Chunk, FinishReason, QueueFull, Sequence, TokenEvent
from hetero_glm5.engine.kv_cache import PagePool
from hetero_glm5.engine.stopping import Stopping

INVALID_TOKEN = -1  # the sampler's answer to logits that are not finite


class Scheduler:
    def __init__(self, config: EngineConfig, pages: PagePool, stopping: Stopping):
        self.config, self.pages, self.stopping = config, pages, stopping
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self._arrivals = count()

    def add(self, seq: Sequence) -> None:
        if len(self.waiting) >= self.config.max_queued_requests:
            raise QueueFull(
                f"{len(self.waiting)} requests are waiting, the limit of --max-queued-requests. Try again later."
            )
        seq.id = next(self._arrivals)
        self.waiting.append(seq)

    def abort(self, seq: Sequence) -> None:
        if not seq.finished:
            self._finish(seq, "abort")

    def schedule(self) -> Batch:
        decodes = self._decodes()
        prefills = self._prefills()
        chunks = prefills if prefills and not self.config.enable_mixed_chunk else decodes + prefills
        assert chunks or not (self.running or self.waiting), "nothing can be scheduled: the pool is too small"
        return Batch(chunks)

    def _decodes(self) -> list[Chunk]:
        chunks = []
        for seq in [s for s in self.running if s.decoding]:
            while seq in self.running and not self.pages.grow(seq.pages, len(seq.tokens)):
                self._preempt(self.running[-1])
            if seq in self.running:
                chunks.append(Chunk(seq, 1))
        return chunks

    def _prefills(self) -> list[Chunk]:
        budget = self.config.chunked_prefill_size
        self._admit(budget)
        chunks = []
        for seq in [s for s in self.running if not s.decoding]:
            count = min(seq.num_pending, budget)
            if count and self.pages.grow(seq.pages, seq.num_computed + count):
                chunks.append(Chunk(seq, count))
                budget -= count
        return chunks

    def _admit(self, budget: int) -> None:
        """Lets waiting sequences in while the step has tokens for them and the pool has pages for their whole prompt,
        beside what running prompts will still take."""
        promised = sum(self.pages.pages_for(len(s.tokens)) - len(s.pages) for s in self.running)
        budget -= sum(s.num_pending for s in self.running if not s.decoding)
        while self.waiting and budget > 0 and len(self.running) < self.config.max_running_requests:
            need = self.pages.pages_for(len(self.waiting[0].tokens))
            if promised + need > self.pages.num_free:
                break
            seq = self.waiting.popleft()
            self.running.append(seq)
            self.running.sort(key=lambda s: s.id)
            promised += need
            budget -= seq.num_pending

    def _preempt(self, seq: Sequence) -> None:
        self.pages.release(seq.pages)
        seq.num_computed = 0
        if seq.logits is not None:
            seq.logits.clear()
        self.running.remove(seq)
        self.waiting.appendleft(seq)

    def commit(self, batch: Batch, tokens: list[int | None]) -> list[TokenEvent]:
        """Takes note of what the step computed; tokens[i] is what was drawn for chunk i, None if nothing was."""
        events = []
        for chunk, token in zip(batch.chunks, tokens, strict=True):
            seq = chunk.seq
            seq.num_computed += chunk.count
            if token is None:
                continue
            if token == INVALID_TOKEN:
                event = TokenEvent(seq, None, "", "error", "the model's logits are not finite for this request")
            else:
                seq.tokens.append(token)
                event = self.stopping.event(seq)
            if event.finish_reason is not None:
                self._finish(seq, event.finish_reason)
            events.append(event)
        return events

    def fail(self, batch: Batch, message: str) -> list[TokenEvent]:
        """Ends the sequences of a batch that could not be computed."""
        unlucky = [chunk.seq for chunk in batch.chunks if not chunk.seq.finished]
        for seq in unlucky:
            self._finish(seq, "error")
        return [TokenEvent(seq, None, "", "error", message) for seq in unlucky]

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        seq.finish_reason = reason
        self.pages.release(seq.pages)
        self.stopping.forget(seq)
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
