"""Finished KV pages as files: they outlive the process, and no damaged one is ever handed out.

`folder/ab/ab12…`, named by the page's key in hex, is a header and the page's bytes. The header holds the key, the size
and the data's CRC-32 (why that one: weights/expert_store.py), so a file is intact if its header equals the one that its
page would be written with now. What is torn, flipped, cut or renamed differs, and is deleted; a torn page passes once
in 2^32.

A file is written under another name, synced and renamed. The sync is not what makes pages safe, the checksum is: it
makes the disk tell its errors while the page can still be left out, bounds dirty memory to one page, and lets the page
cache drop its copy at once, for memory here belongs to the experts. It costs the writer thread, and no other, about two
thirds of its rate at 7 MB a page. The writer holds an flock on its unfinished file, so a start can tell what a killed
writer left behind from what another process is writing.

Several processes may share a folder. A file that vanishes is a miss; each process holds to the size limit what it found
at its start and wrote itself. Prompts are private: files are 0600, folders 0700.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import struct
import tempfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from hetero_glm5.core import UserError

log = logging.getLogger(__name__)

Page = npt.NDArray[np.uint8]

MAGIC, VERSION = b"glm5page", 1
HEADER = struct.Struct("<8sIIQ32s")  # magic, version, CRC-32 of the data, its size, key
PARTIAL = ".partial"  # ending of a file that is being written
NAME = re.compile(rf"([0-9a-f]{{64}})(\.[0-9a-f]+{re.escape(PARTIAL)})?")
LEAST_PAGES = 4
STATS = (
    "disk_pages",
    "disk_bytes",
    "disk_hits",
    "damaged",
    "read_errors",
    "write_errors",
    "bytes_read",
    "bytes_written",
)
TOUCH_SECONDS = 600.0  # a file's time is set at most so often


def check_limit(name: str, limit: int, page_bytes: int) -> None:
    if limit < LEAST_PAGES * page_bytes:
        raise UserError(
            f"{name} is {limit:,} bytes, and a page of {page_bytes:,} bytes has to fit {LEAST_PAGES} times. "
            f"Give it at least {LEAST_PAGES * page_bytes:,} bytes."
        )


@dataclass(slots=True)
class File:
    size: int
    mtime: float  # as far as known, s


class DiskPages:
    """The files, and an index of them in memory, least recently used first. Calls may come from several threads,
    `write` from one at a time. Raises UserError if the folder or the limit cannot be used; after that what cannot be
    read is a miss and what cannot be written is left out, counted in `stats` and told the first time.
    """

    def __init__(self, folder: Path, page_bytes: int, limit: int):
        check_limit("--kv-disk-size", limit, HEADER.size + page_bytes)
        self.folder, self.page_bytes, self.limit = folder, page_bytes, limit
        self._stats = dict.fromkeys(STATS, 0)
        self._files: OrderedDict[bytes, File] = OrderedDict()
        self._lock = Lock()
        self._partial = f".{secrets.token_hex(4)}{PARTIAL}"
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
            for mtime, key, size in sorted(self._scan()):
                self._add(key, File(size, mtime))
        except OSError as error:
            raise UserError(
                f"--kv-disk-path {folder} cannot hold KV pages ({error.strerror}). Name a writable folder."
            ) from error
        self._make_room(0)

    def __contains__(self, key: bytes) -> bool:
        return key in self._files

    @property
    def stats(self) -> dict[str, int]:
        """Files and bytes here now, those of other models too, and counters since the start."""
        return dict(self._stats)

    def read(self, key: bytes) -> Page | None:
        """The page, read-only. None, and out of the index, if it cannot be had as it was written."""
        path, page = self._path(key), np.empty(self.page_bytes, np.uint8)
        try:
            with path.open("rb") as file:
                header, got, more = file.read(HEADER.size), file.readinto(page.data), file.read(1)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if got == self.page_bytes and not more and header == make_header(key, page):
                self._count("disk_hits")
                self._count("bytes_read", HEADER.size + got)
                page.flags.writeable = False
                return page
            self._trouble("damaged", f"{path} is damaged: it is deleted, and its page computed again.")
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass  # another process has evicted it
        except OSError as error:
            self._trouble("read_errors", f"{path} cannot be read ({error.strerror}): its page is computed again.")
        self._forget(key)
        return None

    def write(self, key: bytes, page: Page) -> None:
        """Writes a file and evicts what no longer fits beside it. On an error the page is not on disk."""
        path, size = self._path(key), HEADER.size + self.page_bytes
        self._forget(key)
        self._make_room(size)
        try:
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            self._write_file(path, make_header(key, page), page.data)
        except OSError as error:
            self._trouble("write_errors", f"{path} cannot be written ({error.strerror}): serving goes on without it.")
        else:
            self._add(key, File(size, time.time()))
            self._count("bytes_written", size)

    def remove(self, key: bytes) -> None:
        self._forget(key)
        self._path(key).unlink(missing_ok=True)

    def use(self, keys: Iterable[bytes]) -> list[tuple[bytes, float]]:
        """Makes those of `keys` that are here the most recently used, the last one most. Does no I/O: the result, files
        whose mtime is too old to tell that after a restart, is for `touch`.
        """
        now, stale = time.time(), []
        with self._lock:
            for key in keys:
                if file := self._files.get(key):
                    self._files.move_to_end(key)
                    if abs(now - file.mtime) > TOUCH_SECONDS:  # abs: the clock may once have been wrong
                        file.mtime = now
                        stale.append((key, now))
        return stale

    def touch(self, stale: Sequence[tuple[bytes, float]]) -> None:
        """Sets the files' mtimes, a little apart so that their order survives."""
        for place, (key, now) in enumerate(stale):
            with suppress(OSError):  # only its age is lost
                os.utime(self._path(key), ns=(at := int(now * 1e9) + place * 1000, at))

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.folder / name[:2] / name

    def _add(self, key: bytes, file: File) -> None:
        with self._lock:
            self._files[key] = file
            self._tally(1, file.size)

    def _forget(self, key: bytes) -> None:
        with self._lock:
            if file := self._files.pop(key, None):
                self._tally(-1, -file.size)

    def _tally(self, files: int, size: int) -> None:
        self._stats["disk_pages"] += files
        self._stats["disk_bytes"] += size

    def _make_room(self, size: int) -> None:
        while True:
            with self._lock:
                if self._stats["disk_bytes"] + size <= self.limit or not self._files:
                    return
                oldest, file = self._files.popitem(last=False)
                self._tally(-1, -file.size)
            with suppress(OSError):  # gone already; what cannot be deleted is found again at the next start
                self._path(oldest).unlink()

    def _write_file(self, path: Path, *parts: bytes | memoryview) -> None:
        partial = path.with_name(path.name + self._partial)
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                for part in parts:
                    file.write(part)
                file.flush()
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                partial.rename(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def _scan(self) -> Iterator[tuple[float, bytes, int]]:
        """(mtime, key, size) of every page's file, and no others; removes what killed writers left."""
        for folder in filter(Path.is_dir, self.folder.glob("[0-9a-f][0-9a-f]")):
            for entry in os.scandir(folder):
                name = NAME.fullmatch(entry.name)
                if not name or not name[1].startswith(folder.name) or not entry.is_file(follow_symlinks=False):
                    continue
                with suppress(FileNotFoundError):  # by another process, since
                    if name[2]:
                        sweep(entry.path)
                    else:
                        stat = entry.stat()
                        yield stat.st_mtime, bytes.fromhex(name[1]), stat.st_size

    def _count(self, kind: str, number: int = 1) -> int:
        with self._lock:
            self._stats[kind] += number
            return self._stats[kind]

    def _trouble(self, kind: str, message: str) -> None:
        if self._count(kind) == 1:
            log.warning("%s Further ones are only counted (%s).", message, kind)


def make_header(key: bytes, page: Page) -> bytes:
    return HEADER.pack(MAGIC, VERSION, zlib.crc32(page.data), page.nbytes, key)


def sweep(path: str) -> None:
    """Removes an unfinished file unless its writer still holds it."""
    with open(path, "rb") as file, suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
