"""Continuous batching: which tokens of which sequences the next step computes. Plain Python, no torch.

Decode rows come first and always ride along, each with the tokens drafted after it. Prompts share the rest of the step,
chunked_prefill_size tokens: half of it goes to the oldest, the other half is divided evenly, and what the short ones
leave goes to the long ones; so the oldest always gets on, and a short prompt need not wait for a long one.

A sequence is admitted when its whole prompt fits into available pages, with the pages that the prefix cache and the
page store know of it. If a prompt that is being computed has more in common with it than is known yet, it waits for
that. When a decoding sequence finds no page, the youngest running one is preempted: its pages stay in the prefix cache
while there is room, and what is lost is computed again from its tokens. The oldest sequence can always go on, because
no sequence may be longer than the pool.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import (
    Batch,
    Chunk,
    Drawn,
    FinishReason,
    QueueFull,
    Sequence,
    SlotCopy,
    TokenEvent,
)
from hetero_glm5.engine.prefix_cache import Match, PrefixCache, Trust
from hetero_glm5.engine.restoring import Restoring, Store
from hetero_glm5.engine.stopping import Stopping

INVALID_TOKEN = -1  # the sampler's answer where nothing can be drawn: why, or else the logits are not finite
NOT_FINITE = "the model's numbers are not finite for this request"


@dataclass
class Counts:
    """What has happened since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of them, that were found
    restored_tokens: int = 0  # of those, that came from the page store
    prefilled_tokens: int = 0
    decoded_tokens: int = 0  # rows of drawn tokens that were computed, without drafts
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """`finished` is called with each sequence that ends."""

    def __init__(
        self,
        config: EngineConfig,
        cache: PrefixCache,
        stopping: Stopping,
        store: Store | None = None,
        finished: Callable[[Sequence], None] = lambda seq: None,
    ):
        self._finished = finished
        self.config, self.cache, self.stopping, self.store = config, cache, stopping, store
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.counts = Counts()
        self._arrivals = count()
        self.restoring = Restoring(cache, store)
        self._deadlines = 0  # how many sequences have one
        self._unfilled: list[Sequence] = []  # whose pages the batch in progress fills
        self._untold: list[TokenEvent] = []  # of a commit that raised midway
        self._awaited: dict[Sequence, tuple[Sequence, int]] = {}  # who must have computed how much before it is let in
        self._blocked: tuple[Sequence | None, int] = None, 0  # who found no room, and how many pages it needs

    def add(self, seq: Sequence) -> None:
        if len(self.waiting) >= self.config.max_queued_requests:
            raise QueueFull(
                f"{len(self.waiting)} requests are waiting, the limit of --max-queued-requests. Try again later."
            )
        seq.id = next(self._arrivals)
        self.counts.prompt_tokens += seq.num_prompt
        self._deadlines += seq.deadline is not None
        self.waiting.append(seq)

    def abort(self, seq: Sequence) -> None:
        if not seq.finished:
            self._finish(seq, "abort")

    def expire(self, now: float) -> list[TokenEvent]:
        """Ends the sequences whose deadline is past, by time.monotonic()."""
        if not self._deadlines:
            return []
        late = [s for s in (*self.running, *self.waiting) if s.deadline is not None and s.deadline <= now]
        return [self._fail(seq, "the request's deadline has passed") for seq in late]

    def schedule(self) -> Batch:
        """An empty batch if there is nothing to do but to wait for pages that are being read."""
        self.cache.unpin()
        self.restoring.waits = False
        batch = Batch([])
        before = self.counts.preemptions
        decodes = self._decodes()
        crowded = self.counts.preemptions > before  # whoever made room now must use it before anybody is let in
        if not crowded:
            self._admit(batch.copies)
        decodes += self._resumed(decodes)
        prefills = self._prefills(batch.restored)
        alone = prefills and not (self.config.enable_mixed_chunk or crowded)
        batch.chunks.extend(prefills if alone else decodes + prefills)
        idle = not (self.running or self.waiting) or self.restoring.waits
        assert batch or idle, "nothing can be scheduled: the pool is too small"
        return batch

    def _decodes(self) -> list[Chunk]:
        chunks = []
        for seq in [s for s in self.running if s.decoding]:
            while seq in self.running and not self.cache.grow(seq, len(seq.tokens)):
                self._preempt(self.running[-1])
            if seq in self.running:
                fits = not seq.drafts or self.cache.grow(seq, len(seq.tokens) + len(seq.drafts))
                chunks.append(Chunk(seq, 1, seq.drafts if fits else ()))
        return chunks

    def _resumed(self, decodes: list[Chunk]) -> list[Chunk]:
        """For sequences that were preempted, let in again, and found whole."""
        there = {chunk.seq for chunk in decodes}
        seqs = [s for s in self.running if s.decoding and s not in there and self.cache.grow(s, len(s.tokens))]
        return [Chunk(seq, 1) for seq in seqs]

    def _prefills(self, restored: list[tuple[int, Any]]) -> list[Chunk]:
        prompts = [seq for seq in self.running if not seq.decoding and not self._restores(seq, restored)]
        chunks = []
        for seq, share in zip(prompts, self._shares(prompts), strict=True):
            count = min(share, self.cache.room(seq))
            if count and self.cache.grow(seq, seq.num_computed + count):
                chunks.append(Chunk(seq, count))
        return chunks

    def _shares(self, prompts: list[Sequence]) -> list[int]:
        """Of the step's tokens, how many each prompt gets."""
        budget = self.config.chunked_prefill_size
        wanted = [seq.num_pending for seq in prompts]
        shares = [0] * len(prompts)
        if prompts:
            shares[0] = min(wanted[0], -(-budget // 2))
            budget -= shares[0]
        for left, i in enumerate(sorted(range(1, len(prompts)), key=lambda i: wanted[i]), 1 - len(prompts)):
            shares[i] = min(wanted[i], budget // -left)
            budget -= shares[i]
        for i, share in enumerate(shares):  # what is left, the oldest first
            more = min(wanted[i] - share, budget)
            shares[i] += more
            budget -= more
        return shares

    def _admit(self, copies: list[SlotCopy]) -> None:
        """Lets waiting sequences in while pages are available for their whole prompt, beside what running prompts will
        still take."""
        cache, before = self.cache, list(self.running)  # the pages of whom is let in now are not filled yet
        promised = sum(max(cache.pool.pages_for(len(s.tokens)) - len(s.pages), 0) for s in before)
        for seq in list(islice(self.waiting, self.config.max_running_requests)):
            if len(self.running) >= self.config.max_running_requests:
                break
            if seq is self._blocked[0] and promised + self._blocked[1] > cache.num_available:
                break
            if self._awaits(seq):
                continue
            match = cache.match(seq, before)
            if self._will_await(seq, match) or not self.restoring.ready(seq, match):
                continue
            need = cache.new_pages(match, len(seq.tokens))
            if promised + need > cache.num_available:
                self._blocked = seq, need
                break
            self._let_in(seq, match, copies)
            promised += cache.pool.pages_for(len(seq.tokens)) - len(seq.pages)

    def _let_in(self, seq: Sequence, match: Match, copies: list[SlotCopy]) -> None:
        self.waiting.remove(seq)
        self.running.append(seq)
        self.running.sort(key=lambda s: s.id)
        self.cache.hold(seq, match)
        if self.store is not None:
            self.store.touch([node.key for node in match.nodes])
        if seq in self.restoring:
            return
        copy = self.cache.copy_part(seq, match)
        if copy is not None:
            copies.append(copy)
            self._unfilled.append(seq)
        self._found(seq)

    def _found(self, seq: Sequence) -> None:
        """All that is known of the sequence is in its pages now."""
        if seq.num_cached is None:
            seq.num_cached = seq.num_computed
            self.counts.cached_tokens += seq.num_computed

    def _awaits(self, seq: Sequence) -> bool:
        """Whether the neighbour that it waits for is still at it."""
        if seq not in self._awaited:
            return False
        other, end = self._awaited[seq]
        if other in self.running and not other.decoding and other.num_computed < end:
            return True
        del self._awaited[seq]
        return False

    def _will_await(self, seq: Sequence, match: Match) -> bool:
        """Whether a running prompt will soon have one more whole page of the sequence's beginning than is known."""
        size, tokens = self.cache.pool.page_size, seq.tokens
        if not self.cache.enabled or seq.reads_prompt:
            return False
        for other in self.running:
            end = (max(len(match.nodes), other.num_computed // size) + 1) * size
            likely = other.salt == seq.salt and not other.decoding and end < min(len(tokens), len(other.tokens) + 1)
            if likely and tokens[:end] == other.tokens[:end]:
                self._awaited[seq] = other, end
                return True
        return False

    def _restores(self, seq: Sequence, restored: list[tuple[int, Any]]) -> bool:
        """Gives the sequence pages from the store, if it has asked for some. True if more are to come."""
        if seq not in self.restoring:
            return False
        before = seq.num_computed
        more = self.restoring.restore(seq, restored)
        self.counts.restored_tokens += seq.num_computed - before
        if seq.num_computed > before:
            self._unfilled.append(seq)
        if not more:
            self._found(seq)
        return more

    def _preempt(self, seq: Sequence) -> None:
        self.counts.preemptions += 1
        self._release(seq)
        if seq.logits is not None:
            seq.logits.clear()
        if seq.prompt_logprobs is not None and not seq.num_output:
            seq.prompt_logprobs.clear()  # else they are whole, and may have been read
        self.running.remove(seq)
        self.waiting = deque(sorted([seq, *self.waiting], key=lambda s: s.id))

    def commit(self, batch: Batch, drawn: list[list[Drawn]]) -> list[TokenEvent]:
        """Takes note of what the step computed. drawn[i]: for chunk i the tokens that follow, of which all but the last
        were drafted; empty if none was drawn; INVALID_TOKEN alone if its logits are not finite."""
        events = self._untold = []
        self._filled()
        for chunk, tokens in zip(batch.chunks, drawn, strict=True):
            seq = chunk.seq
            if tokens and tokens[0].token == INVALID_TOKEN:
                error = tokens[0].error
                events.append(self._fail(seq, error or NOT_FINITE, "all" if error else "found"))
                continue
            self._count(chunk, tokens)
            computed = chunk.start + chunk.count + max(len(tokens) - 1, 0)
            for each in tokens:
                seq.tokens.append(each.token)
                event = self.stopping.event(seq, each)
                events.append(event)
                if event.finish_reason is not None:
                    break
            seq.num_computed = min(computed, len(seq.tokens))
            self.cache.keep(seq)
            if tokens and event.finish_reason is not None:
                self._finish(seq, event.finish_reason)
        self._untold = []
        return events

    def _count(self, chunk: Chunk, tokens: list[Drawn]) -> None:
        if chunk.decodes:
            self.counts.decoded_tokens += 1
            self.counts.drafted_tokens += len(chunk.drafts)
            self.counts.accepted_tokens += len(tokens) - 1
        else:
            self.counts.prefilled_tokens += chunk.count

    def fail(self, batch: Batch, message: str) -> list[TokenEvent]:
        """Ends the sequences of a batch that could not be computed, and those whose pages it should have filled."""
        unlucky = dict.fromkeys([*(chunk.seq for chunk in batch.chunks), *self._unfilled])
        events, self._untold = self._untold, []
        events += [self._fail(seq, message) for seq in unlucky if not seq.finished]
        self._unfilled.clear()
        self.cache.unpin()
        return events

    def _filled(self) -> None:
        """The batch in progress was computed, and before it, pages got what is known of them."""
        self.cache.unpin()
        unfilled, self._unfilled = self._unfilled, []
        for seq in unfilled:
            if not seq.finished:
                self.cache.keep(seq)

    def _fail(self, seq: Sequence, message: str, trust: Trust = "all") -> TokenEvent:
        self._finish(seq, "error", trust)
        return TokenEvent(seq, None, "", "error", message)

    def _finish(self, seq: Sequence, reason: FinishReason, trust: Trust = "all") -> None:
        seq.finish_reason = reason
        self._deadlines -= seq.deadline is not None
        self._awaited.pop(seq, None)
        self._release(seq, trust)
        self.stopping.forget(seq)
        self._finished(seq)
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def _release(self, seq: Sequence, trust: Trust = "all") -> None:
        """Its pages go back; what is asked for is not wanted any more."""
        self.restoring.cancel(seq)
        if seq in self._unfilled and trust == "all":
            trust = "kept"
        doubtful = self.cache.release(seq, trust)
        if doubtful and self.store is not None:
            self.store.discard(doubtful)
