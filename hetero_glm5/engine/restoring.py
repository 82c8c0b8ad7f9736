"""Pages of waiting sequences come back from the page store: asked for in runs, a few at a time, so that neither many
sequences nor long ones fill the memory with pages that wait."""

from __future__ import annotations

from collections.abc import Sequence as Run
from dataclasses import dataclass
from typing import Any, Protocol

from hetero_glm5.core import Sequence
from hetero_glm5.engine.prefix_cache import Match, PrefixCache

RESTORED_PAGES = 64  # at most, in one step
FETCHED_PAGES = 128  # that are asked for together (GLM-5: 0.9 GB)
FETCHES = 4  # at most, that are under way or wait to be used


class Fetch(Protocol):
    """A run of pages on its way."""

    @property
    def done(self) -> bool: ...

    @property
    def pages(self) -> Run[Any]:
        """Those that came, from the first on; once done."""
        ...

    def cancel(self) -> None: ...


class Store(Protocol):
    """Where pages outlive the pool."""

    def key(self, parent: bytes | None, tokens: Run[int], salt: str | None = None) -> bytes: ...

    def __contains__(self, key: bytes) -> bool: ...

    def fetch(self, keys: Run[bytes]) -> Fetch: ...

    def touch(self, keys: Run[bytes]) -> None: ...

    def discard(self, keys: Run[bytes]) -> None: ...


@dataclass(frozen=True)
class Asked:
    """For the sequence's pages from number `first` on."""

    first: int
    keys: list[bytes]
    fetch: Fetch


class Restoring:
    """`waits`: whether, since it was set to False, somebody had to wait for the store."""

    def __init__(self, cache: PrefixCache, store: Store | None):
        self._cache, self._store = cache, store
        self._asked: dict[Sequence, Asked] = {}
        self.waits = False

    def __contains__(self, seq: Sequence) -> bool:
        """Whether pages of the sequence are on their way."""
        return seq in self._asked

    def ready(self, seq: Sequence, match: Match) -> bool:
        """Whether a sequence of which the prefix cache knows `match` can be let in: the store has nothing more of it,
        or the next run of it is here."""
        if self._store is None or seq.reads_prompt or not self._cache.enabled:
            return True
        if seq in self._asked and self._asked[seq].first > len(match.nodes):  # pages were evicted since
            self.cancel(seq)
        if seq not in self._asked:
            keys = self._keys(seq, len(match.nodes), match.nodes[-1].key if match.nodes else None)
            if not keys:
                return True
            if len(self._asked) >= FETCHES:
                self.waits = True
                return False
            self._asked[seq] = Asked(len(match.nodes), keys, self._store.fetch(keys))
        asked = self._asked[seq]
        if not asked.fetch.done:
            self.waits = True
            return False
        if asked.first + len(asked.fetch.pages) <= len(match.nodes):
            self.cancel(seq)  # nothing that the cache has not
        return True

    def restore(self, seq: Sequence, restored: list[tuple[int, Any]]) -> bool:
        """Gives a running sequence its next pages, and notes which and what they hold. True if more are to come."""
        asked = self._asked.get(seq)
        if asked is None or self._store is None:
            return False
        if not asked.fetch.done:
            self.waits = True
            return True
        size, pages = self._cache.pool.page_size, asked.fetch.pages
        for page in pages[len(seq.pages) - asked.first :]:
            if len(restored) == RESTORED_PAGES or not self._cache.grow(seq, seq.num_computed + size):
                return True
            restored.append((seq.pages[-1], page))
            seq.num_computed += size
        self.cancel(seq)
        keys = self._keys(seq, len(seq.pages), asked.keys[-1]) if len(pages) == len(asked.keys) else []
        if keys:
            self._asked[seq] = Asked(len(seq.pages), keys, self._store.fetch(keys))
        return bool(keys)

    def cancel(self, seq: Sequence) -> None:
        if seq in self._asked:
            self._asked.pop(seq).fetch.cancel()

    def _keys(self, seq: Sequence, first: int, above: bytes | None) -> list[bytes]:
        """Of the sequence's pages from number `first` on, the next run's; none if the store has not the first."""
        assert self._store is not None
        size = self._cache.pool.page_size
        keys: list[bytes] = []
        for at in range(first * size, len(seq.tokens) - size, size)[:FETCHED_PAGES]:
            above = self._store.key(above, seq.tokens[at : at + size], seq.salt)
            if not keys and above not in self._store:
                break
            keys.append(above)
        return keys
