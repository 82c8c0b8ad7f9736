"""Finished KV pages outside the KV pool: in host memory and on disk, found again by what they hold.

A page's key is a hash of the model's fingerprint, the salt and all token ids up to the page's end, so an equal key
means equal bytes, whoever computed them. `put` writes through: the page enters the host pool (LRU by bytes) and a queue
to the disk, both without waiting. `fetch` takes the longest run that is here: host pages at once, the others by reader
threads. Pages are shared, not copied, and therefore read-only.

The engine thread calls everything here. One writer thread owns writing, eviction and mtimes; some threads read.
Memory: the host pool, at most QUEUED_BYTES on their way to the disk, and the pages of fetches. Fetches are read one
after another, so the last are one fetch's and those that the engine has not taken yet.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Any, cast

import numpy as np

from hetero_glm5.core import UserError
from hetero_glm5.engine.disk_pages import STATS, DiskPages, Page, check_limit

log = logging.getLogger(__name__)

QUEUED_BYTES = 2 << 30  # GLM-5: 290 pages, more than a prefill chunk finishes at once
READERS = 4
PATIENCE = 30  # seconds

Restored = Callable[[Sequence[bytes], list[Page]], None]


class Fetch:
    """A run of pages on its way. It ends before the first page that turns out to be missing or damaged, or that has not
    come after PATIENCE seconds: a disk that hangs must not hold a request for ever."""

    def __init__(self, keys: Sequence[bytes], pages: list[Page | None], restored: Restored):
        self.keys = keys
        self._pages, self._restored = pages, restored
        self._missing = deque(i for i, page in enumerate(pages) if page is None)
        self._reading = 0
        self._patience = time.monotonic() + PATIENCE
        self._lock, self._finished = Lock(), Event()
        if not self._missing:
            self._finished.set()

    @property
    def done(self) -> bool:
        if not self._finished.is_set() and time.monotonic() > self._patience:
            log.warning("KV pages did not come from the disk within %d s; computing them instead", PATIENCE)
            with self._lock:
                self._missing.clear()
                self._finished.set()
        return self._finished.is_set()

    @property
    def pages(self) -> list[Page]:
        """uint8 [page_bytes] each, read-only, for keys[: len(pages)]; only once done."""
        assert self.done, "the pages are still being read"
        return self._whole()

    def wait(self, timeout: float | None = None) -> bool:
        return self._finished.wait(timeout)

    def cancel(self) -> None:
        """Ends it now and lets its pages go; what is being read at this moment is thrown away."""
        with self._lock:
            self._pages.clear()
            self._missing.clear()
            self._finished.set()

    def claim(self) -> int | None:
        """The page that the calling reader reads next."""
        with self._lock:
            if not self._missing:
                return None
            self._reading += 1
            return self._missing.popleft()

    def deliver(self, index: int, page: Page | None) -> None:
        with self._lock:
            self._reading -= 1
            if self._finished.is_set():
                return
            self._pages[index] = page
            if page is None:
                self._missing.clear()  # the run ends here
            if self._missing or self._reading:
                return
            self._restored(self.keys, self._whole())
            self._finished.set()

    def _whole(self) -> list[Page]:
        end = next((i for i, page in enumerate(self._pages) if page is None), None)
        return cast("list[Page]", self._pages[:end])


class PageStore:
    """`fingerprint` stands for all that decides a page's bytes but the tokens: weights, dtype, layout, page size.

    `page_bytes` is the size of every page; host_bytes 0 means no host pool, disk None no disk. Raises UserError for a
    limit below a few pages and for a folder that cannot be used.
    """

    def __init__(
        self,
        fingerprint: bytes,
        page_bytes: int,
        *,
        host_bytes: int = 0,
        disk: Path | None = None,
        disk_bytes: int = 0,
    ):
        if host_bytes:
            check_limit("--kv-host-size", host_bytes, page_bytes)
        if disk_bytes and disk is None:
            raise UserError(f"--kv-disk-size is {disk_bytes:,} bytes with no place for them. Give --kv-disk-path too.")
        self.fingerprint, self.page_bytes = fingerprint, page_bytes
        self._host: OrderedDict[bytes, Page] = OrderedDict()  # least recently used first
        self._host_pages = host_bytes // page_bytes
        self._disk = None if disk is None else DiskPages(disk, page_bytes, disk_bytes)
        self._queued: dict[bytes, Page] = {}
        self._host_hits = self._dropped = 0
        self._closed = False
        self._lock = Lock()
        self._writer = ThreadPoolExecutor(1, "kv-page-writer")
        self._readers = ThreadPoolExecutor(READERS, "kv-page-reader")

    @property
    def stats(self) -> dict[str, int]:
        """Pages and bytes held now, and counters since the start."""
        return {
            "host_pages": len(self._host),
            "host_bytes": len(self._host) * self.page_bytes,
            "host_hits": self._host_hits,
            "queued_pages": len(self._queued),
            "dropped": self._dropped,  # pages the disk was too slow for
            **(dict.fromkeys(STATS, 0) if self._disk is None else self._disk.stats),
        }

    def key(self, parent: bytes | None, tokens: Sequence[int], salt: str | None = None) -> bytes:
        """32 bytes that stand for a page of `tokens` (0 <= id < 2**32) after the page `parent`, or for a first page
        (None) of this model under `salt`, which so decides every later page's key too.
        """
        if parent is None:
            parent = self._root(salt)
        return hashlib.blake2b(parent + array("I", tokens).tobytes(), digest_size=32).digest()

    def __contains__(self, key: bytes) -> bool:
        return key in self._host or key in self._queued or (self._disk is not None and key in self._disk)

    def put(self, key: bytes, page: Page) -> None:
        """Takes over `page`, uint8 [page_bytes], contiguous; the caller must not write to it any more. Never waits: if
        too much is queued already, the page does not get to the disk.
        """
        if page.dtype != np.uint8 or page.shape != (self.page_bytes,) or not page.flags.c_contiguous:
            raise ValueError(f"a page is contiguous uint8 [{self.page_bytes}], not {page.dtype} {list(page.shape)}")
        page.flags.writeable = False
        with self._lock:
            self._keep(key, page)
            self._use([key])
            if self._disk is None or key in self._queued or key in self._disk:
                return
            if (len(self._queued) + 1) * self.page_bytes > QUEUED_BYTES:
                self._dropped += 1
                return
            self._queued[key] = page
        self._submit(self._writer, self._write, key)

    def fetch(self, keys: Sequence[bytes]) -> Fetch:
        """The longest run from the start of `keys` that is here, read in the background as far as it is on disk."""
        with self._lock:
            run = list(itertools.takewhile(self.__contains__, keys))
            pages = [self._host.get(key, self._queued.get(key)) for key in run]
            self._use(reversed(run))
            missing = sum(page is None for page in pages)
            self._host_hits += len(run) - missing
        fetch = Fetch(run, pages, self._restored)
        for _ in range(min(missing, READERS)):
            self._submit(self._readers, self._read, fetch)
        return fetch

    def touch(self, keys: Sequence[bytes]) -> None:
        """Tells that the run `keys` was used without being fetched, because the KV pool still had it. A run's first
        pages count as used last: without them the others are of no use.
        """
        with self._lock:
            self._use(reversed(keys))

    def discard(self, keys: Sequence[bytes]) -> None:
        """Forgets pages that cannot be trusted."""
        with self._lock:
            for key in keys:
                self._host.pop(key, None)
        if self._disk is not None:
            for key in keys:
                self._submit(self._writer, self._disk.remove, key)  # after what is queued

    def close(self, drain: bool = True) -> None:
        """Ends the threads; fetches still open are cancelled. `drain` writes out what is queued for the disk first."""
        self._closed = True
        self._readers.shutdown()
        self._writer.shutdown(cancel_futures=not drain)
        self._dropped += len(self._queued)
        self._queued.clear()

    def _root(self, salt: str | None) -> bytes:
        text = b"" if salt is None else b"+" + salt.encode("utf-8", "surrogatepass")
        sizes = array("Q", [self.page_bytes, len(self.fingerprint)]).tobytes()
        return hashlib.blake2b(sizes + self.fingerprint + text, digest_size=32, person=b"KV page root").digest()

    def _keep(self, key: bytes, page: Page) -> None:
        self._host[key] = page
        self._host.move_to_end(key)
        while len(self._host) > self._host_pages:
            self._host.popitem(last=False)

    def _use(self, keys: Iterable[bytes]) -> None:
        keys = list(keys)
        for key in keys:
            if key in self._host:
                self._host.move_to_end(key)
        if self._disk is not None and (stale := self._disk.use(keys)):
            self._submit(self._writer, self._disk.touch, stale)

    def _restored(self, keys: Sequence[bytes], pages: list[Page]) -> None:
        with self._lock:
            for key, page in reversed(list(zip(keys, pages, strict=False))):
                self._keep(key, page)

    def _read(self, fetch: Fetch) -> None:
        assert self._disk is not None
        while not self._closed and (index := fetch.claim()) is not None:
            page = self._host.get(fetch.keys[index])  # another fetch may have brought it meanwhile
            try:
                if page is None:
                    page = self._disk.read(fetch.keys[index])
            finally:
                fetch.deliver(index, page)
        if self._closed:
            fetch.cancel()

    def _write(self, key: bytes) -> None:
        assert self._disk is not None
        try:
            self._disk.write(key, self._queued[key])
        finally:
            with self._lock:
                del self._queued[key]

    def _submit(self, pool: ThreadPoolExecutor, task: Callable[..., None], argument: Any) -> None:
        pool.submit(task, argument).add_done_callback(report)


def report(future: Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()):
        log.error("a thread of the KV page store failed", exc_info=error)
