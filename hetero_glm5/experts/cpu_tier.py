"""The host tier: one layer's routed experts on CPU cores, over _C. Names no weight format and no ISA."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hetero_glm5 import _C
from hetero_glm5.weights.quantize import PackedExperts, host_array


class HostPool:
    """Threads, scratch and the queue thread, shared by all layers.

    threads: 0 = every physical core of the cpuset; the calling thread is one of them. isa: a name of _C.isas();
    None = what HETERO_GLM5_ISA names, else the best. nodes: NUMA nodes, each with an even part of the threads, which
    work first on what their node holds of experts divided over the same nodes; none = all nodes, as one.
    ValueError on a name or a node that is not present, and on fewer threads than nodes. Calls take turns.
    """

    def __init__(self, threads: int = 0, isa: str | None = None, nodes: Sequence[int] = ()) -> None:
        self._c = _C.HostPool(threads, isa, list(nodes))
        self.nodes = tuple(nodes)
        self.threads: int = self._c.threads
        self.node_threads = tuple(len(cpus) for _, cpus in self._c.thread_groups)
        self.isa: str = self._c.isa

    def close(self) -> None:
        """Runs what was submitted, ends the threads. Later calls raise ValueError; closing twice is fine."""
        self._c.close()


class Ticket:
    """A submitted call. Dropping it unwaited waits for the call, because the call uses its memory."""

    def __init__(self, c: _C.Ticket, y: Tensor) -> None:
        self._c = c
        self._y = y

    def wait(self) -> Tensor:
        """-> y [T, H] float32 once it is complete; raises what the call raised. May be called again."""
        self._c.wait()
        return self._y


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
        self._c = _C.MoeLayer(self.pool._c, packed.weights)

    @property
    def isa(self) -> str:
        return self.pool.isa

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x [T, H] float32 or bfloat16, topk_ids [T, k] int32 or int64 (-1 = not on this tier), topk_weights [T, k]
        float32, all contiguous on the CPU, T >= 0 -> y [T, H] float32.

        ValueError on a wrong shape or dtype, and on an id that is outside -1..E-1 or not resident.
        """
        arrays, y = _arrays(x, topk_ids, topk_weights), self._output(x)
        self._c.forward(*arrays, y.numpy())
        return y

    def submit(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Ticket:
        """The same on the queue thread. The inputs are kept alive and must not be written before wait() returns."""
        arrays, y = _arrays(x, topk_ids, topk_weights), self._output(x)
        return Ticket(self._c.submit(*arrays, y.numpy()), y)

    def _output(self, x: Tensor) -> Tensor:
        return torch.empty((x.shape[0], self.packed.layout.hidden), dtype=torch.float32)


def _arrays(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16):  # the extension sees bfloat16 as int16
        raise ValueError(f"x is {x.dtype} of shape {list(x.shape)}, must be float32 or bfloat16 [tokens, hidden]")
    return host_array("x", x), host_array("topk_ids", topk_ids), host_array("topk_weights", topk_weights)
