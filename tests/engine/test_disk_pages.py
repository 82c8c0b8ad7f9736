"""Pages as files: what is read back is what was written, or nothing, whatever happens to the folder meanwhile."""

import fcntl
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from hetero_glm5.core import UserError
from hetero_glm5.engine.disk_pages import HEADER, LEAST_PAGES, TOUCH_SECONDS, DiskPages, make_header

SIZE = 300
FILE = SIZE + HEADER.size
ROOMY = 100 * FILE


def key(i: int) -> bytes:
    return bytes([i]) * 32


def page(i: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8)


def path(folder: Path, i: int) -> Path:
    name = key(i).hex()
    return folder / name[:2] / name


def filled(folder: Path, *indices: int, limit: int = ROOMY) -> DiskPages:
    pages = DiskPages(folder, SIZE, limit)
    for i in indices:
        pages.write(key(i), page(i))
    return pages


def held(pages: DiskPages, among: range = range(20)) -> list[int]:
    return [i for i in among if key(i) in pages]


def assert_read(pages: DiskPages, i: int) -> None:
    np.testing.assert_array_equal(pages.read(key(i)), page(i))


def age(folder: Path, *indices: int) -> None:
    """Makes the files a day old, the first the oldest."""
    for place, i in enumerate(indices):
        os.utime(path(folder, i), (at := time.time() - 86400 + place, at))


def test_pages_come_back_also_after_a_restart(tmp_path):
    pages = filled(tmp_path, 0, 1, 2)
    for _ in range(2):
        assert held(pages) == [0, 1, 2] and pages.stats["disk_pages"] == 3 and pages.stats["disk_bytes"] == 3 * FILE
        for i in range(3):
            assert_read(pages, i)
        assert pages.stats["disk_hits"] == 3 and pages.stats["bytes_read"] == 3 * FILE
        pages = DiskPages(tmp_path, SIZE, ROOMY)
    assert pages.read(key(9)) is None


def test_a_page_read_cannot_be_written_to(tmp_path):
    found = filled(tmp_path, 0).read(key(0))
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_prompts_are_private(tmp_path):
    filled(tmp_path / "new", 0)
    for file in (tmp_path / "new").rglob("*"):
        assert file.stat().st_mode & 0o777 == (0o700 if file.is_dir() else 0o600)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_any_flipped_bit_is_found(tmp_path, caplog):
    pages = filled(tmp_path, 0)
    intact = path(tmp_path, 0).read_bytes()
    assert len(intact) == FILE
    for bit in range(0, 8 * FILE, 3):  # 3 is coprime to 8: every byte and every place in a byte
        damaged = bytearray(intact)
        damaged[bit // 8] ^= 1 << bit % 8
        path(tmp_path, 0).write_bytes(damaged)
        pages = DiskPages(tmp_path, SIZE, ROOMY)
        assert key(0) in pages and pages.read(key(0)) is None
        assert key(0) not in pages and pages.stats["damaged"] == 1 and pages.stats["disk_bytes"] == 0
        assert not path(tmp_path, 0).exists()
    assert "is damaged" in caplog.text


def write_as(folder: Path, i: int, data: bytes) -> None:
    path(folder, i).parent.mkdir(exist_ok=True)
    path(folder, i).write_bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * FILE,
        make_header(key(1), page(1)) + page(1).tobytes(),  # another page, renamed
        make_header(key(0), page(0)) + page(1).tobytes(),
        make_header(key(0), page(0)) + page(0).tobytes()[:-1],
        make_header(key(0), page(0)) + page(0).tobytes() + b"\0",
        make_header(key(0), page(0))[: HEADER.size - 1],
        make_header(key(0), page(0, SIZE + 8)) + page(0, SIZE + 8).tobytes(),
        (make_header(key(0), page(0)) + page(0).tobytes())[: FILE // 2].ljust(FILE, b"\0"),
    ],
    ids=["empty", "zeros", "renamed", "swapped", "short", "long", "header only", "another page size", "torn"],
)
def test_a_file_that_is_not_this_page_is_found(tmp_path, data):
    write_as(tmp_path, 0, data)
    pages = DiskPages(tmp_path, SIZE, ROOMY)
    assert key(0) in pages and pages.read(key(0)) is None and key(0) not in pages
    assert pages.stats["damaged"] == 1 and pages.stats["disk_hits"] == 0
    pages.write(key(0), page(0))
    assert_read(pages, 0)


def test_what_is_not_a_page_is_left_alone(tmp_path):
    filled(tmp_path, 0)
    home = path(tmp_path, 0).parent
    (tmp_path / "aa").mkdir()
    foreign = [tmp_path / "notes", tmp_path / "ab", home / "notes", tmp_path / "aa" / key(0).hex(), home / ("0" * 65)]
    for file in foreign:
        file.write_bytes(b"x" * 10_000)
    path(tmp_path, 3).parent.mkdir()
    path(tmp_path, 3).symlink_to(tmp_path / "notes")
    pages = filled(tmp_path, *range(4, 10), limit=LEAST_PAGES * FILE)
    assert (
        pages.stats["disk_pages"] == LEAST_PAGES
        and pages.stats["disk_bytes"] == LEAST_PAGES * FILE
        and key(0) not in pages
    )
    assert all(file.stat().st_size == 10_000 for file in foreign) and path(tmp_path, 3).is_symlink()


def test_the_least_recently_used_go_first(tmp_path):
    pages = filled(tmp_path, 0, 1, 2, 3, limit=4 * FILE)
    pages.use([key(1), key(0)])
    pages.write(key(4), page(4))
    assert held(pages) == [0, 1, 3, 4] and not path(tmp_path, 2).exists() and pages.stats["disk_bytes"] == 4 * FILE
    pages.write(key(5), page(5))
    pages.write(key(6), page(6))
    assert held(pages) == [0, 4, 5, 6]
    pages.write(key(6), page(6))
    assert held(pages) == [0, 4, 5, 6], "writing a page again takes no more room"


def test_the_order_outlives_a_restart(tmp_path):
    pages = filled(tmp_path, 0, 1, 2, 3)
    age(tmp_path, 3, 1, 0, 2)
    pages = DiskPages(tmp_path, SIZE, ROOMY)
    pages.touch(pages.use([key(0), key(3)]))
    pages = DiskPages(tmp_path, SIZE, 4 * FILE)
    for i, gone in ((4, 1), (5, 2), (6, 0), (7, 3)):
        pages.write(key(i), page(i))
        assert key(gone) not in pages and pages.stats["disk_pages"] == 4
    age(tmp_path, 7, 6, 5, 4)
    assert held(DiskPages(tmp_path, SIZE - 64, 4 * (FILE - 64))) == [4, 5, 6], "a smaller limit holds at once"


def test_a_time_is_set_only_so_often(tmp_path):
    pages = filled(tmp_path, 0, 1)
    assert pages.use([key(0), key(1), key(2)]) == []
    for since, stale in ((TOUCH_SECONDS - 5, []), (TOUCH_SECONDS + 5, [key(0)]), (-2 * TOUCH_SECONDS, [key(0)])):
        os.utime(path(tmp_path, 0), (at := time.time() - since, at))
        pages = DiskPages(tmp_path, SIZE, ROOMY)
        assert [k for k, _ in pages.use([key(0), key(1)])] == stale
        assert pages.use([key(0), key(1)]) == []


def test_pages_of_another_model_age_alike(tmp_path):
    other = DiskPages(tmp_path, 2 * SIZE, ROOMY)
    for i in (10, 11):
        other.write(key(i), page(i, 2 * SIZE))
    filled(tmp_path, 0, 1)
    age(tmp_path, 10, 0, 11, 1)
    both = 2 * FILE + 2 * (FILE + SIZE)
    pages = DiskPages(tmp_path, SIZE, both)
    assert pages.stats["disk_bytes"] == both and held(pages) == [0, 1, 10, 11]
    pages.write(key(2), page(2))
    assert held(pages) == [0, 1, 2, 11]
    assert pages.read(key(11)) is None


def test_two_stores_in_one_folder(tmp_path):
    ours, theirs = filled(tmp_path, 0, 1, 2, 3, limit=4 * FILE), filled(tmp_path, limit=4 * FILE)
    assert held(theirs) == [0, 1, 2, 3]
    theirs.write(key(4), page(4))
    theirs.write(key(3), page(3))
    assert key(0) in ours and ours.read(key(0)) is None and key(0) not in ours and ours.stats["disk_bytes"] == 3 * FILE
    assert ours.stats["damaged"] == ours.stats["read_errors"] == 0
    assert_read(ours, 3)
    ours.write(key(4), page(4))
    assert_read(theirs, 4)


def test_only_what_a_dead_writer_left_is_swept(tmp_path):
    filled(tmp_path, 0)
    home = path(tmp_path, 0).parent
    dead, alive = (home / f"{key(0).hex()}.{who}.partial" for who in ("dead", "a11fe"))
    dead.write_bytes(b"x" * 100)
    with alive.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert held(DiskPages(tmp_path, SIZE, ROOMY)) == [0]
        assert alive.exists() and not dead.exists()
    DiskPages(tmp_path, SIZE, ROOMY)
    assert list(home.iterdir()) == [path(tmp_path, 0)]


def test_a_start_leaves_alone_what_another_writes(tmp_path, monkeypatch):
    sync, begun = os.fdatasync, []

    def start_another(file):
        begun.append(files(tmp_path)[0].name)
        assert held(DiskPages(tmp_path, SIZE, ROOMY)) == []
        sync(file)

    monkeypatch.setattr(os, "fdatasync", start_another)
    pages = filled(tmp_path, 0)
    assert len(begun) == 1 and begun[0].endswith(".partial")
    assert_read(pages, 0)


def files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


@contextmanager
def full_disk(most: int):
    """No file can grow beyond `most` bytes: writing fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("most", [0, HEADER.size, FILE - 1])
def test_a_full_disk_leaves_pages_out(tmp_path, caplog, most):
    caplog.set_level(logging.WARNING)
    pages = filled(tmp_path, 0)
    with full_disk(most):
        pages.write(key(1), page(1))
        pages.write(key(2), page(2))
        assert_read(pages, 0)
    assert pages.stats["write_errors"] == 2 and held(pages) == [0] and files(tmp_path) == [path(tmp_path, 0)]
    assert len(caplog.records) == 1 and "File too large" in caplog.text
    pages.write(key(1), page(1))
    assert_read(pages, 1)


def test_a_disk_that_fails(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(5, "Input/output error")

    pages = filled(tmp_path, 0, 1)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fail)
        pages.write(key(2), page(2))
        broken.setattr(os, "posix_fadvise", fail)
        assert pages.read(key(0)) is None
    assert pages.stats["write_errors"] == pages.stats["read_errors"] == 1 and len(caplog.records) == 2
    assert held(pages) == [1] and files(tmp_path) == [path(tmp_path, 0), path(tmp_path, 1)]


def test_a_folder_that_vanishes(tmp_path):
    pages = filled(tmp_path / "a", 0, 1)
    (tmp_path / "a").rename(tmp_path / "b")
    assert pages.read(key(0)) is None and held(pages) == [1]
    pages.touch(pages.use([key(1)]))
    pages.write(key(2), page(2))
    assert_read(pages, 2)


def test_what_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc"), Path("/proc/below")):
        with pytest.raises(UserError, match=rf"^--kv-disk-path {folder} .*writable folder\.$"):
            DiskPages(folder, SIZE, ROOMY)
    for limit in (-1, 0, LEAST_PAGES * FILE - 1):
        with pytest.raises(UserError, match=rf"--kv-disk-size is {limit:,} bytes.*at least {LEAST_PAGES * FILE:,}"):
            DiskPages(tmp_path, SIZE, limit)
    DiskPages(tmp_path, SIZE, LEAST_PAGES * FILE)


def write_for_ever(folder: str, size: str, first: str) -> None:
    """The victim: pages of one byte value each, named by it and their number."""
    pages = DiskPages(Path(folder), int(size), 64 * (int(size) + HEADER.size))
    print("ready", flush=True)
    for number in range(int(first), 1 << 30):
        pages.write(victims_key(number), victims_page(number, int(size)))


def victims_key(number: int) -> bytes:
    return bytes([number % 251]) + number.to_bytes(31, "big")


def victims_page(number: int, size: int) -> np.ndarray:
    return np.full(size, number % 251, np.uint8)


def test_a_writer_killed_at_any_moment(tmp_path):
    """kill -9 at random moments, each time with a fresh start on what is left: every page there is whole and right."""
    size, seen, left_over = 200_000, 0, 0
    rng = np.random.default_rng(0)
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_disk_pages as t; t.write_for_ever(*sys.argv[1:])"
    for round_ in range(4):
        victims = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path), str(size), str(1_000_000 * (1 + 8 * round_ + i))],
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parent,
            )
            for i in range(8)
        ]
        for victim in victims:
            assert victim.stdout.readline() == b"ready\n"
        for victim in victims:
            time.sleep(rng.uniform(0, 0.03))
            victim.send_signal(signal.SIGKILL)
            assert victim.wait() == -signal.SIGKILL
            victim.stdout.close()
        left_over += sum(file.suffix == ".partial" for file in files(tmp_path))
        pages = DiskPages(tmp_path, size, 1 << 40)
        found = files(tmp_path)
        assert len(found) == pages.stats["disk_pages"]
        for file in found:
            number = int.from_bytes(bytes.fromhex(file.name)[1:], "big")
            np.testing.assert_array_equal(pages.read(victims_key(number)), victims_page(number, size))
        seen += len(found)
    assert seen > 100 and left_over > 0, "the victims were killed before they had written"
