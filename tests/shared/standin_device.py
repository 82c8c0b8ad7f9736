"""A device for tests that copies beside what it computes: lines, each a thread that does what was enqueued, in order,
after seeded delays, with the waits that were asked for. A copy takes time and is torn meanwhile; a computation reads
its slot twice. So whoever lets a computation see half a copy, or another expert, is found out."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hetero_glm5.experts.gpu_tier import GpuExperts


class Line:
    """most_delay: seconds before and within an operation."""

    def __init__(self, seed: int, most_delay: float):
        self.random, self.most_delay = random.Random(seed), most_delay
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def enqueue(self, operation: Callable[[], None]) -> None:
        self._todo.put(operation)

    def point(self) -> threading.Event:
        event = threading.Event()
        self.enqueue(event.set)
        return event

    def pause(self) -> None:
        if self.random.random() < 0.5:
            time.sleep(self.random.random() * self.most_delay)

    def close(self) -> None:
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (operation := self._todo.get()) is not None:
            self.pause()
            operation()


class StandinMark:
    def __init__(self, copies: StandinCopies):
        self._copies, self._event, self._error = copies, threading.Event(), ""
        copies.line.enqueue(self._set)

    def _set(self) -> None:
        self._error, self._copies.error = self._copies.error, ""
        self._event.set()

    def passed(self) -> bool:
        if self._event.is_set() and self._error:
            raise RuntimeError(self._error)
        return self._event.is_set()

    def hold(self) -> None:
        self._copies.compute.enqueue(lambda: self._event.wait() and None)


class StandinCopies:
    """fail: how often, of 1, a copy fails and leaves its target torn."""

    def __init__(self, compute: Line, seed: int, most_delay: float, fail: float = 0.0):
        self.compute, self.line, self.fail, self.error = compute, Line(seed, most_delay), fail, ""
        self.count = 0

    def pin(self, memory: Tensor) -> None:
        pass

    def after_compute(self) -> None:
        computed = self.compute.point()
        self.line.enqueue(lambda: computed.wait() and None)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.count += 1

        def run() -> None:
            half = len(target) // 2
            target[:half] = source[:half]
            self.line.pause()
            if self.line.random.random() < self.fail:
                self.error = "the link is down"
            else:
                target[half:] = source[half:]

        self.line.enqueue(run)

    def mark(self) -> StandinMark:
        return StandinMark(self)

    def close(self) -> None:
        self.line.point().wait()


class TaggedExperts(GpuExperts):
    """Computes nothing: looks whether the experts that it is asked for are in their slots. A blob is its tag as int64
    over and over; `weights` hold the tags of the rows' experts."""

    def __init__(self, layout, num_slots: int, compute: Line):
        super().__init__(layout, num_slots, "cpu")
        self.compute, self.seen, self.wrong = compute, 0, 0

    def __call__(self, x: Tensor, slot_ids: Tensor, weights: Tensor) -> Tensor:
        for slot, tag in zip(slot_ids.flatten().tolist(), weights.flatten().tolist(), strict=True):
            if slot >= 0:
                self.compute.enqueue(lambda blob=self.slots[slot], tag=int(tag): self._look(blob, tag))
        return torch.zeros(x.shape)

    def add(self, y: Tensor, x: Tensor, weights: Tensor, places: Tensor, blob: Tensor) -> None:
        for tag in weights.flatten()[places].unique().tolist():
            self.compute.enqueue(lambda tag=int(tag): self._look(blob, tag))

    def _look(self, blob: Tensor, tag: int) -> None:
        right = True
        for _ in range(2):
            right &= bool((blob.view(torch.int64) == tag).all())
            self.compute.pause()
        self.seen += 1
        self.wrong += not right
