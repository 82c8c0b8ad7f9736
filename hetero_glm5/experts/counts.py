"""How often each expert is chosen, counted on the device: decode rows and prefill rows apart.

A counter is an int64 of two halves, each an int32 count: a prefill row adds 1, a decode row 2^32, so that one
scatter-add for each layer counts both. `put_` reads index -1 as the last counter; a layer has one counter more than
experts, so that ids of -1 need no mask. A half overflows at 2^31 selections of an expert in one step.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

PREFILL, DECODE = 1, 1 << 32


class RoutingCounts:
    """A step is begin(), add() for each MoE layer, drain(), all on the current stream of `device`; none of them waits.
    take() gives the steps' counts, the oldest first. For one thread."""

    def __init__(self, layers: int, experts: int, device: str | torch.device):
        self.shape, self.device = (layers, experts), torch.device(device)
        self._counters = torch.zeros(layers, experts + 1, dtype=torch.int64, device=device)
        self._units = self._counters.new_empty(0, 1)
        self._drained: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._spare: list[Tensor] = []  # host memory that was taken

    def begin(self, decode_rows: Tensor) -> None:
        """Starts a step of T rows; bool [T]: which of them are decoded. What was not drained is forgotten."""
        self._counters.zero_()
        self._units = torch.where(decode_rows.to(self.device), DECODE, PREFILL)[:, None]

    def add(self, layer: int, ids: Tensor) -> None:
        """Counts the rows' experts of one MoE layer, 0 the first; ids int64 [T, k], -1 = none."""
        self._counters[layer].put_(ids, self._units.expand(ids.shape), accumulate=True)

    def drain(self) -> None:
        """Ends the step: enqueues the copy of its counts to the host."""
        on_host = self._spare.pop() if self._spare else self._host_memory()
        on_host.copy_(self._counters, non_blocking=True)
        self._drained.append((on_host, torch.cuda.current_stream().record_event() if self._counters.is_cuda else None))

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """decode, prefill int64 [layers, experts] of the oldest step that was drained and not taken; waits until its
        copy has ended. IndexError if there is none."""
        on_host, copied = self._drained.popleft()
        if copied is not None:
            copied.synchronize()
        halves = on_host.numpy().view(np.int32).reshape(*on_host.shape, 2)[:, :-1]
        prefill, decode = halves[..., 0].astype(np.int64), halves[..., 1].astype(np.int64)
        self._spare.append(on_host)
        return decode, prefill

    @property
    def pending(self) -> int:
        """Steps that were drained and not taken."""
        return len(self._drained)

    def _host_memory(self) -> Tensor:
        with torch.inference_mode(False):  # it is written in and outside of that mode
            return torch.empty_like(self._counters, device="cpu", pin_memory=self._counters.is_cuda)
