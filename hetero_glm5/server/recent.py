"""What was put in lately, up to a size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """Values by name, of sizes that sum up to `most` at most: the least recently used go first. Safe to use from
    several threads."""

    def __init__(self, most: int):
        self._most, self._total = most, 0
        self._values: OrderedDict[str, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, name: str, value: V, size: int) -> None:
        with self._lock:
            self._total += size - self._values.pop(name, (value, 0))[1]
            self._values[name] = (value, size)
            while self._total > self._most:
                self._total -= self._values.popitem(last=False)[1][1]

    def get(self, name: str) -> V | None:
        with self._lock:
            if name not in self._values:
                return None
            self._values.move_to_end(name)
            return self._values[name][0]
