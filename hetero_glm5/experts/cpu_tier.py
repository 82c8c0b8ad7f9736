"""The host tier: one layer's routed experts on CPU cores, over _C. Names no weight format and no ISA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hetero_glm5 import _C
from hetero_glm5.experts.host_stream import DeviceStream, HostStream
from hetero_glm5.weights.quantize import PackedExperts, host_array


class HostPool:
    """Threads, scratch and the queue thread, shared by all layers.

    threads: 0 = every physical core of the cpuset; the calling thread is one of them. isa: a name of _C.isas();
    None = what HETERO_GLM5_ISA names, else the best. nodes: NUMA nodes, each with an even part of the threads, which
    work first on what their node holds of experts divided over the same nodes; none = all nodes, as one.
    ValueError on a name or a node that is not present, and on fewer threads than nodes. Calls take turns.
    """

    def __init__(self, threads: int = 0, isa: str | None = None, nodes: Sequence[int] = ()) -> None:
        self.handle = _C.HostPool(threads, isa, list(nodes))
        self.nodes = tuple(nodes)
        self.threads: int = self.handle.threads
        self.node_threads = tuple(len(cpus) for _, cpus in self.handle.thread_groups)
        self.isa: str = self.handle.isa
        self._streams: dict[tuple[int, int], HostStream] = {}

    def stream(self, stream: DeviceStream) -> HostStream:
        """The calls of that stream. One thread at a time uses the streams of a pool."""
        key = stream.device, stream.handle
        if key not in self._streams:
            self._streams[key] = HostStream(stream)
        return self._streams[key]

    def check(self) -> None:
        """Raises what a call in a stream raised, if the stream is past it, as it is after a synchronisation."""
        for stream in self._streams.values():
            stream.check()

    def close(self) -> None:
        """Waits for the calls in streams, ends the threads. Later calls raise ValueError; closing twice is fine."""
        try:
            while self._streams:
                self._streams.popitem()[1].close()
        finally:
            self.handle.close()


class CpuExperts:
    """y[t] = sum over k of weights[t, k] * down_e(silu(gate_e x[t]) * up_e x[t]), e = ids[t, k], on the host.

    A row's result does not depend, bit for bit, on the other rows, the number of threads, or how experts are divided.
    pool: a shared HostPool; without one, an own pool of `threads` and `isa` is made.
    """

    def __init__(
        self, packed: PackedExperts, threads: int = 2, isa: str | None = None, pool: HostPool | None = None
    ) -> None:
        self.packed = packed
        self.pool = HostPool(threads, isa) if pool is None else pool
        self._c = _C.MoeLayer(self.pool.handle, packed.weights)

    @property
    def isa(self) -> str:
        return self.pool.isa

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x [T, H] float32 or bfloat16, topk_ids [T, k] int32 or int64 (-1 = not on this tier), topk_weights [T, k]
        float32, all contiguous on the CPU, T >= 0 -> y [T, H] float32.

        ValueError on a wrong shape or dtype, and on an id that is outside -1..E-1 or not resident.
        """
        _check_rows(x)
        arrays = host_array("x", x), host_array("topk_ids", topk_ids), host_array("topk_weights", topk_weights)
        y = torch.empty((x.shape[0], self.packed.layout.hidden), dtype=torch.float32)
        self._c.forward(*arrays, y.numpy())
        return y

    def start(self, stream: DeviceStream, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Callable[[], Tensor]:
        """The same with tensors on the stream's device, enqueued: returns join() -> y [T, H] float32. join() holds
        the stream, not the caller; it is called once. The caller can be HostStream.SLOTS calls ahead of the stream.

        ValueError on a wrong shape or dtype. What the call raises later (a bad id) comes out of the next start() or
        pool.check() after it; its y is NaN. RuntimeError if CUDA refuses or the device has failed.
        """
        _check_rows(x)
        return self.pool.stream(stream).start(stream, self._c, x, topk_ids, topk_weights)


def _check_rows(x: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16):  # the extension sees bfloat16 as int16
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}, must be float32 or bfloat16 [tokens, hidden]")
