"""The page store against a dictionary: what it gives is always the right page, and it gives what its limits allow."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hetero_glm5.core import UserError
from hetero_glm5.engine import disk_pages, page_store
from hetero_glm5.engine.disk_pages import HEADER, LEAST_PAGES, DiskPages
from hetero_glm5.engine.page_store import PageStore

SIZE = 200
FILE = SIZE + HEADER.size
NAMES = [bytes([i]) * 32 for i in range(12)]


def page(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture
def open_store(tmp_path):
    """Makes stores of 100 pages in memory and 100 on disk, or as asked; closes them at the end."""
    stores = []

    def open_store(**options) -> PageStore:
        options = {"host_bytes": 100 * SIZE, "disk": tmp_path, "disk_bytes": 100 * FILE} | options
        stores.append(PageStore(b"model", SIZE, **options))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def written(store: PageStore, *indices: int) -> PageStore:
    """Puts pages and waits until they are where they go."""
    for i in indices:
        store.put(NAMES[i], page(i))
    settle(store)
    return store


def settle(store: PageStore) -> None:
    until(lambda: not store.stats["queued_pages"], "the writer is stuck")


def until(comes: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + 20
    while not comes():
        assert time.monotonic() < end, otherwise
        time.sleep(0.0005)


def fetched(store: PageStore, *indices: int) -> int:
    """How many pages of this run the store gives; they are the right ones."""
    fetch = store.fetch([NAMES[i] for i in indices])
    assert fetch.wait(20) and fetch.done
    pages = fetch.pages
    for i, got in zip(indices, pages, strict=False):
        np.testing.assert_array_equal(got, page(i))
    return len(pages)


def file(folder: Path, i: int) -> Path:
    return folder / NAMES[i].hex()[:2] / NAMES[i].hex()


def test_keys_tell_everything_apart():
    size, prompt = 4, list(range(100, 112))

    def chain(store, tokens, salt=None):
        parent, keys = None, []
        for at in range(0, len(tokens), size):
            keys.append(parent := store.key(parent, tokens[at : at + size], salt))
        return keys

    store = PageStore(b"model", SIZE)
    base = chain(store, prompt)
    assert base == chain(PageStore(b"model", SIZE), tuple(prompt)) and all(len(key) == 32 for key in base)
    assert chain(store, [*prompt[:4], 7, *prompt[5:]])[0] == base[0]
    others = [
        chain(PageStore(b"model2", SIZE), prompt),
        chain(PageStore(b"model", SIZE + 1), prompt),
        *(chain(store, prompt, salt) for salt in ("", "a", "b", "\ud800")),
        chain(store, [101, 100, *prompt[2:]]),
        chain(store, [2**32 - 1, *prompt[1:]]),
        chain(store, prompt[:4] * 3)[1:],
        chain(store, [*prompt[:4], 7, *prompt[5:]])[1:],
    ]
    everything = sum(others, base)
    assert len(set(everything)) == len(everything)


def test_pages_are_shared_not_copied(open_store):
    store, mine = open_store(), page(0)
    store.put(NAMES[0], mine)
    assert store.fetch([NAMES[0]]).pages[0] is mine
    with pytest.raises(ValueError, match="read-only"):
        mine[0] = 1


@pytest.mark.parametrize(
    "bad", [np.zeros(SIZE - 1, np.uint8), np.zeros(SIZE, np.int8), np.zeros(2 * SIZE, np.uint8)[::2]]
)
def test_what_is_not_a_page_is_refused(open_store, bad):
    store = open_store()
    with pytest.raises(ValueError, match=r"contiguous uint8 \[200\]"):
        store.put(NAMES[0], bad)
    assert NAMES[0] not in store


def test_limits_that_make_no_sense_are_refused(tmp_path):
    for bytes_ in (-1, LEAST_PAGES * SIZE - 1):
        with pytest.raises(UserError, match=rf"--kv-host-size is {bytes_:,} bytes.*at least 800 bytes"):
            PageStore(b"", SIZE, host_bytes=bytes_)
    with pytest.raises(UserError, match=r"--kv-disk-size is 5,000 bytes .* --kv-disk-path"):
        PageStore(b"", SIZE, disk_bytes=5000)
    with pytest.raises(UserError, match="--kv-disk-size is 0 bytes"):
        PageStore(b"", SIZE, disk=tmp_path)


def test_without_a_disk_the_host_pool_serves(open_store):
    store = written(open_store(host_bytes=4 * SIZE + 1, disk=None, disk_bytes=0), 0, 1, 2, 3)
    assert fetched(store, 0, 1) == 2
    written(store, 4, 5)
    assert fetched(store, 0, 1, 4, 5, 2) == 4 and store.stats["host_pages"] == 4
    assert store.stats["host_hits"] == 6 and store.stats["disk_pages"] == 0


def test_without_a_host_pool_the_disk_serves(open_store):
    store = written(open_store(host_bytes=0), 0, 1, 2)
    assert fetched(store, 0, 1, 2, 3) == 3 and store.stats["host_pages"] == 0
    assert store.stats["disk_hits"] == 3 and store.stats["host_hits"] == 0


def test_what_was_put_is_there_at_once(open_store, monkeypatch):
    """Also while the disk is slow and there is no host pool: from the queue."""
    go = threading.Event()
    write = DiskPages.write
    monkeypatch.setattr(DiskPages, "write", lambda *args: go.wait(20) and write(*args))
    store = open_store(host_bytes=0)
    for i in range(3):
        store.put(NAMES[i], page(i))
        store.put(NAMES[i], page(i))
    assert store.stats["queued_pages"] == 3 and fetched(store, 0, 1, 2) == 3
    go.set()
    settle(store)
    written(store, 0, 1, 2)
    assert store.stats["disk_pages"] == 3 and store.stats["bytes_written"] == 3 * FILE


def test_the_queue_is_bounded(open_store, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(DiskPages, "write", lambda *args: go.wait(20))
    monkeypatch.setattr(page_store, "QUEUED_BYTES", 3 * SIZE + 1)
    store = open_store(host_bytes=LEAST_PAGES * SIZE)
    started = time.monotonic()
    for i in range(10):
        store.put(NAMES[i], page(i))
    assert time.monotonic() - started < 10, "put waited for the disk"
    assert store.stats["queued_pages"] == 3 and store.stats["dropped"] == 7
    assert [i for i in range(10) if NAMES[i] in store] == [0, 1, 2, 6, 7, 8, 9]
    go.set()


def test_a_run_ends_at_the_first_page_that_is_missing_or_damaged(open_store, tmp_path):
    written(open_store(), 0, 1, 2, 3, 4, 5)
    store = open_store()
    assert fetched(store, 0, 1, 9, 2) == 2 and fetched(store, 9, 0) == 0 and fetched(store) == 0
    file(tmp_path, 3).write_bytes(file(tmp_path, 4).read_bytes())
    assert fetched(store, 0, 1, 2, 3, 4, 5) == 3 and store.stats["damaged"] == 1
    assert NAMES[3] not in store
    file(tmp_path, 4).unlink()
    assert fetched(store, 4, 5) == 0 and NAMES[4] not in store
    assert fetched(written(store, 3, 4), 0, 1, 2, 3, 4, 5) == 6


def test_stats_are_told_also_when_nothing_is_left(open_store, tmp_path):
    written(open_store(), 0)
    store = open_store()
    os.truncate(file(tmp_path, 0), FILE - 1)
    assert fetched(store, 0) == 0
    assert store.stats["damaged"] == 1 and store.stats["disk_pages"] == store.stats["disk_bytes"] == 0
    assert store.stats.keys() == open_store(disk=None, disk_bytes=0).stats.keys()


def test_restored_pages_are_in_memory_again(open_store, tmp_path):
    written(open_store(), 0, 1, 2, 3, 4, 5)
    store = open_store(host_bytes=4 * SIZE)
    assert fetched(store, 0, 1, 2, 3, 4, 5) == 6
    assert store.stats["host_pages"] == 4 and store.stats["disk_hits"] == 6
    for i in range(6):
        file(tmp_path, i).unlink()
    assert fetched(store, 0, 1, 2, 3, 4, 5) == 4, "the start of a run is what is worth keeping"


@pytest.mark.parametrize("way", ["fetch", "touch"])
def test_a_run_is_evicted_from_its_end(open_store, way):
    store = written(open_store(host_bytes=4 * SIZE, disk_bytes=5 * FILE), 9, 0, 1, 2, 3)
    getattr(store, way)(NAMES[:4])
    written(store, 10, 11)
    assert [i for i in range(12) if NAMES[i] in store._host] == [0, 1, 10, 11]
    assert [i for i in range(12) if NAMES[i] in open_store()] == [0, 1, 2, 10, 11]


def test_a_page_in_memory_stays_young_on_disk(open_store):
    store = written(open_store(disk_bytes=5 * FILE), 0, 1, 2, 3, 4)
    assert fetched(store, 0) == 1
    store.touch([NAMES[1], NAMES[2], NAMES[9]])
    store.put(NAMES[3], page(3))
    written(store, 5)
    reopened = open_store()
    assert [i for i in range(6) if NAMES[i] in reopened] == [0, 1, 2, 3, 5]


def test_use_is_remembered_on_disk(open_store, tmp_path):
    store = written(open_store(), 0, 1)
    store.close()
    for i in (0, 1):
        os.utime(file(tmp_path, i), (0, 0))
    store = open_store()
    store.touch([NAMES[0]])
    store.close()
    assert time.time() - file(tmp_path, 0).stat().st_mtime < 60 and file(tmp_path, 1).stat().st_mtime == 0


@pytest.fixture
def slow_reads(monkeypatch):
    """Reads wait for the event `go` before they begin; `began` is released once for each."""
    read = DiskPages.read
    go, began = threading.Event(), threading.Semaphore(0)

    def slow(self, key):
        began.release()
        assert go.wait(20)
        return read(self, key)

    monkeypatch.setattr(DiskPages, "read", slow)
    return go, began


def test_nothing_behind_a_damaged_page_is_read(open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(page_store, "READERS", 1)
    written(open_store(), 0, 1, 2, 3)
    file(tmp_path, 1).write_bytes(b"")
    store = open_store()
    assert fetched(store, 0, 1, 2, 3) == 1 and store.stats["disk_hits"] == 1


def test_two_fetches_of_a_run_read_it_once(open_store, slow_reads, monkeypatch):
    monkeypatch.setattr(page_store, "READERS", 1)  # more of them start on the second while the first is ending
    go, _ = slow_reads
    written(open_store(), *range(12))
    store = open_store()
    fetches = [store.fetch(NAMES), store.fetch(NAMES)]
    go.set()
    assert all(fetch.wait(20) and len(fetch.pages) == 12 for fetch in fetches)
    assert store.stats["disk_hits"] == 12


def test_a_cancelled_fetch_lets_the_next_one_through(open_store, slow_reads, caplog):
    go, began = slow_reads
    written(open_store(), *range(12))
    store = open_store()
    first = store.fetch(NAMES)
    second = store.fetch(NAMES[:2])
    assert began.acquire(timeout=20) and not first.done and not second.done
    first.cancel()
    assert first.done and first.pages == []
    go.set()
    assert second.wait(20) and len(second.pages) == 2
    assert store.stats["disk_hits"] <= 2 + page_store.READERS, "only what was being read is read for nothing"
    second.cancel()
    assert second.pages == [] and not caplog.records


def test_close_ends_open_fetches(open_store, slow_reads):
    go, began = slow_reads
    written(open_store(), *range(12))
    store = open_store()
    fetches = [store.fetch(NAMES) for _ in range(3)]
    assert began.acquire(timeout=20)
    closing = threading.Thread(target=store.close)
    closing.start()
    while not store._closed:
        time.sleep(0.001)
    go.set()
    closing.join(20)
    assert not closing.is_alive() and all(fetch.done for fetch in fetches)
    assert sum(len(fetch.pages) for fetch in fetches) <= page_store.READERS


@pytest.mark.parametrize("drain", [True, False])
def test_close_drains_if_asked(open_store, monkeypatch, drain):
    begun, go = threading.Event(), threading.Event()
    write = DiskPages.write

    def slow(*args):
        begun.set()
        assert go.wait(20)
        write(*args)

    monkeypatch.setattr(DiskPages, "write", slow)
    store = open_store()
    for i in range(5):
        store.put(NAMES[i], page(i))
    assert begun.wait(20)
    threading.Timer(0.05, go.set).start()
    store.close(drain)
    store.close()
    assert fetched(open_store(), 0, 1, 2, 3, 4) == (5 if drain else 1)
    assert store.stats["dropped"] == (0 if drain else 4) and store.stats["queued_pages"] == 0


def test_an_error_nobody_foresaw_is_told_and_blocks_nothing(open_store, monkeypatch, caplog):
    def fail(*_):
        raise MemoryError("no room for a page")

    written(open_store(), 0, 1)
    store = open_store()
    with monkeypatch.context() as broken:
        broken.setattr(disk_pages, "make_header", fail)
        assert fetched(store, 0, 1) == 0
        written(store, 2)
    until(lambda: "no room for a page" in caplog.text, "nothing is told")
    assert fetched(written(store, 3), 0, 1, 2) == 3, "pages the disk has or the memory kept"


RUNS = st.tuples(st.integers(0, 7), st.integers(1, 8)).map(lambda run: list(range(run[0], min(sum(run), 8))))


class AgainstADictionary(RuleBasedStateMachine):
    """Host pool and disk as two ordered dictionaries of the page numbers they hold, least recently used first. One file
    at a time is damaged or deleted, so that what the readers notice does not depend on which of them is faster.
    """

    @initialize(host=st.sampled_from([0, 4, 5]), disk=st.sampled_from([None, 4, 6, 9]))
    def begin(self, host, disk):
        self.host_room, self.disk_room = host, disk or 0
        self.home = TemporaryDirectory()
        self.folder = Path(self.home.name)
        self.options = {"disk": self.folder, "disk_bytes": disk * FILE} if disk else {}
        self.host, self.disk, self.bad = OrderedDict(), OrderedDict(), None
        self.store = PageStore(b"model", SIZE, host_bytes=host * SIZE, **self.options)

    def use(self, run):
        for tier in (self.host, self.disk):
            for i in reversed(run):
                if i in tier:
                    tier.move_to_end(i)

    def keep(self, i):
        self.host[i] = None
        self.host.move_to_end(i)
        while len(self.host) > self.host_room:
            self.host.popitem(last=False)

    def forget(self, i):
        del self.disk[i]
        if i == self.bad:
            self.bad = None

    @rule(run=RUNS)
    def put(self, run):
        for i in run:
            self.keep(i)
            self.use([i])
            if self.disk_room and i not in self.disk:
                while len(self.disk) >= self.disk_room:
                    self.forget(next(iter(self.disk)))
                self.disk[i] = None
            written(self.store, i)

    @rule(run=RUNS)
    def fetch(self, run):
        known = list(takewhile(lambda i: i in self.host or i in self.disk, run))
        self.use(known)
        from_disk = [i for i in known if i not in self.host]
        if self.bad in from_disk:
            known = known[: known.index(self.bad)]
            self.forget(self.bad)
        assert fetched(self.store, *run) == len(known)
        if from_disk:
            for i in reversed(known):
                self.keep(i)

    @rule(run=RUNS)
    def touch(self, run):
        self.store.touch([NAMES[i] for i in run])
        self.use(run)

    @precondition(lambda self: self.disk and self.bad is None)
    @rule(data=st.data(), bit=st.integers(0, 8 * FILE - 1), delete=st.booleans())
    def harm(self, data, bit, delete):
        self.bad = data.draw(st.sampled_from(sorted(self.disk)))
        content = bytearray(file(self.folder, self.bad).read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        file(self.folder, self.bad).unlink()
        if not delete:
            file(self.folder, self.bad).write_bytes(content)

    @precondition(lambda self: self.disk_room)
    @rule(drain=st.booleans())
    def restart(self, drain):
        self.store.close(drain)
        if self.bad is not None and not file(self.folder, self.bad).exists():
            self.forget(self.bad)
        self.host.clear()
        for place, i in enumerate(self.disk):  # times too close to tell apart are not what is tested here
            os.utime(file(self.folder, i), (at := time.time() - 100 + place, at))
        self.store = PageStore(b"model", SIZE, host_bytes=self.host_room * SIZE, **self.options)

    @invariant()
    def the_store_holds_what_the_model_holds(self):
        held = [i for i in range(8) if NAMES[i] in self.store]
        assert held == sorted(self.host | self.disk)
        stats = self.store.stats
        assert (stats["host_pages"], stats["disk_pages"]) == (len(self.host), len(self.disk))
        assert stats["host_bytes"] <= self.host_room * SIZE and stats["disk_bytes"] <= self.disk_room * FILE

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.home.cleanup()


AgainstADictionary.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True
)
TestAgainstADictionary = AgainstADictionary.TestCase


def test_a_disk_that_hangs_holds_nobody_for_ever(open_store, monkeypatch):
    written(open_store(), 0, 1, 2).close()
    store = open_store(host_bytes=0)
    hang, read = threading.Event(), store._disk.read
    monkeypatch.setattr(page_store, "PATIENCE", 0.05)
    monkeypatch.setattr(store._disk, "read", lambda key: read(key) if key == NAMES[0] else hang.wait(20) and None)
    fetch = store.fetch(NAMES[:3])
    until = time.monotonic() + 10
    while not fetch.done:
        assert time.monotonic() < until
        time.sleep(0.005)
    assert [got.tolist() for got in fetch.pages] == [page(0).tolist()]
    hang.set()
