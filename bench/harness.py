"""What the benchmarks share: timings, a roof measured in the same run, and rows that set one against the other.

A row says how long a call took, how many bytes it had to read, and what share of the read bandwidth that is. Rows print
as a table or as JSON lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hetero_glm5 import _C

GB = 1e9


@dataclass(frozen=True)
class Timing:
    """Seconds of each call."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p99(self) -> float:
        return float(np.percentile(self.seconds, 99))


@dataclass(frozen=True)
class Row:
    """One measured thing. `nbytes`: what one call must read; `roof`: bytes per second that the memory can deliver."""

    name: str
    timing: Timing
    nbytes: float = 0.0
    roof: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.timing.median if self.timing.median else 0.0

    @property
    def of_roof(self) -> float | None:
        return self.rate / self.roof if self.nbytes and self.roof else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "median_ms": self.timing.median * 1e3,
            "p99_ms": self.timing.p99 * 1e3,
            "bytes": self.nbytes,
            "gb_per_s": self.rate / GB,
            "of_roof": self.of_roof,
        }


def measure(call: Callable[[], object], *, repeats: int, warmup: int = 1, sync: Callable[[], object] = lambda: None):
    """Times `repeats` calls after `warmup` unmeasured ones; `sync` waits for asynchronous work. Returns a Timing."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        call()
        sync()
        seconds.append(time.perf_counter() - start)
    return Timing(tuple(seconds))


def synchroniser(device: str) -> Callable[[], object]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def read_roof(device: str = "cpu", *, nbytes: int = 2 << 30, repeats: int = 5) -> float:
    """Bytes per second at which all physical cores (or the GPU) read memory far larger than any cache.

    The best of `repeats`: a roof is what the machine can do, not what it did while something else was running.
    """
    if device == "cpu":
        probe = _C.probe.Roofs(nbytes=nbytes)
        return max(probe.read() for _ in range(repeats))
    numbers = torch.ones(nbytes // 4, device=device)
    timing = measure(numbers.sum, repeats=repeats, sync=synchroniser(device))
    return numbers.nbytes / min(timing.seconds)


def print_table(rows: Iterable[Row], whole: float) -> None:
    """`whole`: the seconds of which each row's share is told."""
    print(f"{'part':<16}{'ms':>10}{'p99 ms':>10}{'share':>8}{'MB':>11}{'GB/s':>9}{'of roof':>9}")
    for row in rows:
        share = row.timing.median / whole if whole else 0.0
        line = f"{row.name:<16}{row.timing.median * 1e3:>10.3f}{row.timing.p99 * 1e3:>10.3f}{share:>8.1%}"
        if row.of_roof is not None:
            line += f"{row.nbytes / 1e6:>11.2f}{row.rate / GB:>9.1f}{row.of_roof:>9.1%}"
        print(line)


def print_json(rows: Iterable[Row], **facts: Any) -> None:
    """One JSON object a line; `facts` (model, batch, roofs…) are repeated in each."""
    for row in rows:
        print(json.dumps(facts | row.as_dict()))
