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
from collections.abc import Sequence as Run
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Protocol

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
from hetero_glm5.engine.prefix_cache import Match, PrefixCache
from hetero_glm5.engine.stopping import Stopping

INVALID_TOKEN = -1  # the sampler's answer to logits that are not finite
NOT_FINITE = "the model's hidden states are not finite for this request"
RESTORED_PAGES = 64  # of a step, at most, that come from the page store


class Fetch(Protocol):
    """Pages on their way from the page store."""

    @property
    def done(self) -> bool: ...

    @property
    def pages(self) -> Run[Any]: ...

    def cancel(self) -> None: ...


class Store(Protocol):
    """Where pages outlive the pool."""

    def key(self, parent: bytes | None, tokens: Run[int], salt: str | None = None) -> bytes: ...

    def __contains__(self, key: bytes) -> bool: ...

    def fetch(self, keys: Run[bytes]) -> Fetch: ...

    def touch(self, keys: Run[bytes]) -> None: ...


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
        self._fetches: dict[Sequence, tuple[int, Fetch]] = {}  # and the number of the first page that is asked for
        self._deadlines = 0  # how many sequences have one
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
        self._fetch(seq, self.cache.match(seq))

    def abort(self, seq: Sequence) -> None:
        if not seq.finished:
            self._finish(seq, "abort")

    def expire(self, now: float) -> list[TokenEvent]:
        """Ends the sequences whose deadline is past, by time.monotonic()."""
        if not self._deadlines:
            return []
        late = [s for s in (*self.running, *self.waiting) if s.deadline is not None and s.deadline <= now]
        return [self._fail(seq, "the request's deadline has passed") for seq in late]

    @property
    def waits_for_store(self) -> bool:
        """Whether pages are being read that a sequence waits for."""
        return any(not fetch.done for _, fetch in self._fetches.values())

    def schedule(self) -> Batch:
        self.cache.unpin()
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
        idle = not (self.running or self.waiting) or self.waits_for_store
        assert batch or idle, "nothing can be scheduled: the pool is too small"
        return batch

    def _decodes(self) -> list[Chunk]:
        chunks = []
        for seq in [s for s in self.running if s.decoding]:
            while seq in self.running and not self.cache.grow(seq, len(seq.tokens)):
                self._preempt(self.running[-1])
            if seq in self.running:
                fits = self.cache.grow(seq, len(seq.tokens) + len(seq.drafts))
                chunks.append(Chunk(seq, 1, seq.drafts if fits else ()))
        return chunks

    def _resumed(self, decodes: list[Chunk]) -> list[Chunk]:
        """For sequences that were preempted, let in again, and found whole."""
        there = {chunk.seq for chunk in decodes}
        seqs = [s for s in self.running if s.decoding and s not in there and self.cache.grow(s, len(s.tokens))]
        return [Chunk(seq, 1) for seq in seqs]

    def _prefills(self, restored: list[tuple[int, Any]]) -> list[Chunk]:
        prompts = [seq for seq in self.running if not seq.decoding and not self._restore(seq, restored)]
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
        cache = self.cache
        promised = sum(cache.pool.pages_for(len(s.tokens)) - len(s.pages) for s in self.running)
        for seq in list(islice(self.waiting, self.config.max_running_requests)):
            if len(self.running) >= self.config.max_running_requests:
                break
            if seq is self._blocked[0] and promised + self._blocked[1] > cache.num_available:
                break
            match = cache.match(seq, self.running)
            if self._awaits_neighbour(seq, match) or not self._fetched(seq, match):
                continue
            need = cache.new_pages(match, len(seq.tokens))
            if promised + need > cache.num_available:
                self._blocked = seq, need
                break
            self.waiting.remove(seq)
            cache.hold(seq, match)
            if self.store is not None:
                self.store.touch([node.key for node in match.nodes])
            if seq not in self._fetches:
                copy = cache.copy_part(seq, match)
                copies += [copy] if copy is not None else []
                self._found(seq)
            self.running.append(seq)
            self.running.sort(key=lambda s: s.id)
            promised += cache.pool.pages_for(len(seq.tokens)) - len(seq.pages)

    def _found(self, seq: Sequence) -> None:
        """All that is known of the sequence is in its pages now."""
        if seq.num_cached is None:
            seq.num_cached = seq.num_computed
            self.counts.cached_tokens += seq.num_computed

    def _awaits_neighbour(self, seq: Sequence, match: Match) -> bool:
        """Whether a running prompt will soon have more whole pages of the sequence's beginning than are known."""
        size, tokens = self.cache.pool.page_size, seq.tokens
        if not self.cache.enabled or seq.reads_prompt:
            return False
        for other in self.running:
            end = (max(len(match.nodes), other.num_computed // size) + 1) * size
            likely = other.salt == seq.salt and not other.decoding and end < min(len(tokens), len(other.tokens) + 1)
            if likely and tokens[:end] == other.tokens[:end]:
                return True
        return False

    def _fetch(self, seq: Sequence, match: Match) -> None:
        """Asks the page store for the pages after those that were found."""
        if self.store is None or seq.reads_prompt or not self.cache.enabled:
            return
        size, first = self.cache.pool.page_size, len(match.nodes)
        key = match.nodes[-1].key if match.nodes else None
        keys: list[bytes] = []
        for at in range(first * size, len(seq.tokens) - size, size):
            key = self.store.key(key, seq.tokens[at : at + size], seq.salt)
            if not keys and key not in self.store:
                return
            keys.append(key)
        if keys:
            self._fetches[seq] = first, self.store.fetch(keys)

    def _fetched(self, seq: Sequence, match: Match) -> bool:
        """Whether all that the store has of the sequence is here."""
        if seq not in self._fetches or self._fetches[seq][0] > len(match.nodes):  # pages were evicted since
            self._cancel(seq)
            self._fetch(seq, match)
        if seq not in self._fetches:
            return True
        first, fetch = self._fetches[seq]
        if fetch.done and first + len(fetch.pages) <= len(match.nodes):
            self._cancel(seq)  # nothing that the cache has not
        return fetch.done

    def _restore(self, seq: Sequence, restored: list[tuple[int, Any]]) -> bool:
        """Gives the sequence its next pages from the store, RESTORED_PAGES in a step. True if some are left."""
        if seq not in self._fetches:
            return False
        first, fetch = self._fetches[seq]
        size = self.cache.pool.page_size
        for page in fetch.pages[len(seq.pages) - first :]:
            if len(restored) == RESTORED_PAGES or not self.cache.grow(seq, seq.num_computed + size):
                return True
            restored.append((seq.pages[-1], page))
            seq.num_computed += size
            self.counts.restored_tokens += size
        self._cancel(seq)
        self._found(seq)
        return False

    def _cancel(self, seq: Sequence) -> None:
        if seq in self._fetches:
            self._fetches.pop(seq)[1].cancel()

    def _preempt(self, seq: Sequence) -> None:
        self.counts.preemptions += 1
        self._cancel(seq)
        self.cache.release(seq)
        if seq.logits is not None:
            seq.logits.clear()
        if seq.prompt_logprobs is not None and not seq.num_output:
            seq.prompt_logprobs.clear()  # else they are whole, and may have been read
        self.running.remove(seq)
        self.waiting.appendleft(seq)

    def commit(self, batch: Batch, drawn: list[list[Drawn]]) -> list[TokenEvent]:
        """Takes note of what the step computed. drawn[i]: for chunk i the tokens that follow, of which all but the last
        were drafted; empty if none was drawn; INVALID_TOKEN alone if its logits are not finite."""
        events = []
        for chunk, tokens in zip(batch.chunks, drawn, strict=True):
            seq = chunk.seq
            if tokens and tokens[0].token == INVALID_TOKEN:
                events.append(self._fail(seq, tokens[0].error or NOT_FINITE, sound=False))
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
        filled = {page for page, _ in batch.restored} | {copy.target for copy in batch.copies}
        unlucky = [chunk.seq for chunk in batch.chunks if not chunk.seq.finished]
        unlucky += [seq for seq in self.running if filled.intersection(seq.pages) and seq not in unlucky]
        return [self._fail(seq, message, sound=not filled.intersection(seq.pages)) for seq in unlucky]

    def _fail(self, seq: Sequence, message: str, *, sound: bool = True) -> TokenEvent:
        self._finish(seq, "error", sound=sound)
        return TokenEvent(seq, None, "", "error", message)

    def _finish(self, seq: Sequence, reason: FinishReason, *, sound: bool = True) -> None:
        seq.finish_reason = reason
        self._deadlines -= seq.deadline is not None
        self._cancel(seq)
        self.cache.release(seq, sound=sound)
        self.stopping.forget(seq)
        self._finished(seq)
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
