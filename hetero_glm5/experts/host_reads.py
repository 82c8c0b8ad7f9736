"""What the host reads of the experts' weights, and in which time, where the host part of a layer runs at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class HostReads:
    """Bytes and seconds since the start. A step is begin(), timed() for each layer, end()."""

    bytes: int = 0
    seconds: float = 0.0
    gb_per_s: float | None = None  # of the latest step that only decoded, which nothing but reading bounds
    _before: tuple[int, float] = (0, 0.0)
    _decodes: bool = False

    def begin(self, decoded: Tensor) -> None:
        """decoded bool [T]: which rows of the step are decoded, not prefilled."""
        self._before, self._decodes = (self.bytes, self.seconds), bool(decoded.all())

    def timed(self, ids: Tensor, blob_bytes: int, compute: Callable[[], Tensor]) -> Tensor:
        """compute(), which reads each expert in ids [T, k], on the CPU, once; -1 = none."""
        started = time.perf_counter()
        y = compute()
        self.seconds += time.perf_counter() - started
        self.bytes += blob_bytes * int(np.count_nonzero(np.bincount(ids.numpy().ravel() + 1)[1:]))
        return y

    def end(self) -> None:
        size, seconds = self.bytes - self._before[0], self.seconds - self._before[1]
        if self._decodes and size:
            self.gb_per_s = size / seconds / 1e9
