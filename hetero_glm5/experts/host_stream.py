"""Host experts in the order of a device's stream: the caller enqueues and goes on, as it does with kernels.

A call is copied from the device into a slot's pinned buffers, computed by the host pool when the stream gets there, and
copied back (csrc/moe/stream_calls.h). `DeviceStream` is what this needs of a stream; `CudaStream` is the real one, and
tests bring another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hetero_glm5 import _C
from hetero_glm5.weights.quantize import host_array

ALIGN = 64  # bytes


class DeviceStream(Protocol):
    device: int  # its number
    handle: int  # cudaStream_t; that of a device's default stream is 0
    library: str  # of the CUDA runtime; empty = the loaded one

    def pinned(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of host memory that copies may use for as long as they need it."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueues a copy between the stream's device and such memory."""


class CudaStream:
    """The stream that torch enqueues on now. ValueError if `device` is not the current one, where CUDA's calls go."""

    library = ""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.cuda.current_device()
        if device.index not in (None, self.device):
            raise ValueError(
                f"x is on cuda:{device.index}, but the current CUDA device is {self.device}; "
                f"call torch.cuda.set_device({device.index}) first"
            )
        self._stream = torch.cuda.current_stream(device)
        self.handle = self._stream.cuda_stream

    def pinned(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # it is written in and outside of that mode
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)  # torch keeps it for its copies

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):  # which need not be the current one by the time of join()
            target.copy_(source, non_blocking=True)


class HostStream:
    """The calls of one stream, which one thread enqueues. RuntimeError if there is no CUDA runtime."""

    SLOTS: int = _C.StreamCalls.SLOTS

    def __init__(self, stream: DeviceStream) -> None:
        self._c = _C.StreamCalls(stream.handle, stream.library)
        self._memory = [torch.empty(0, dtype=torch.uint8)] * self.SLOTS

    def start(
        self, stream: DeviceStream, layer: _C.MoeLayer, x: Tensor, ids: Tensor, weights: Tensor
    ) -> Callable[[], Tensor]:
        """Returns join() -> y [T, H] float32 on the device; see CpuExperts.start."""
        ticket = self._c.take()
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        *inputs, output = self._buffers(stream, ticket % self.SLOTS, (x, ids, weights, y))
        for buffer, source in zip(inputs, (x, ids, weights), strict=True):
            stream.copy(buffer, source)
        self._c.submit(ticket, layer, *(host_array("the slot", buffer) for buffer in (*inputs, output)))

        def join() -> Tensor:
            self._c.wait(ticket)
            stream.copy(y, output)
            return y

        return join

    @classmethod
    def pinned_bytes(cls, rows: int, hidden: int, topk: int, itemsize: int) -> int:
        """What all slots take once each has had a call of `rows`; itemsize: of x's type, with int64 ids."""
        return cls.SLOTS * sum(_aligned(rows * n) for n in (hidden * itemsize, topk * 8, topk * 4, hidden * 4))

    def check(self) -> None:
        """Raises what a call raised that the stream has passed. After a synchronisation, nothing is left behind."""
        self._c.check()

    def close(self) -> None:
        """Waits for the calls and lets go of the layers they used."""
        self._c.close()

    def _buffers(self, stream: DeviceStream, slot: int, like: tuple[Tensor, ...]) -> list[Tensor]:
        """Tensors of those shapes and types, one after the other in the slot's memory, as large as its largest call."""
        sizes = [_aligned(t.nbytes) for t in like]
        if sum(sizes) > self._memory[slot].nbytes:
            self._memory[slot] = stream.pinned(sum(sizes))
        parts = self._memory[slot][: sum(sizes)].split(sizes)
        return [part[: t.nbytes].view(t.dtype).view(t.shape) for part, t in zip(parts, like, strict=True)]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
