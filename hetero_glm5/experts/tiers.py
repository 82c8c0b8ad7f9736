"""The two tiers of routed experts as one callable.

slot_of[layer, expert] (-1 = host) is the only description of where an expert is. Each call splits a step's top-k by it,
starts the host part, runs the device part, and returns a function that joins and adds the two. With a CUDA device all
of this only enqueues, and the host part runs when the stream gets there; on a CPU device both tiers are the same cores,
so it runs at once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from hetero_glm5.core import no_clock
from hetero_glm5.experts.cpu_tier import CpuExperts, HostPool
from hetero_glm5.experts.gpu_tier import GpuExperts
from hetero_glm5.experts.host_stream import CudaStream, DeviceStream
from hetero_glm5.weights.expert_source import ExpertSource
from hetero_glm5.weights.load import ModelWeights
from hetero_glm5.weights.quantize import PackedExperts


class ExpertTiers:
    """`host[layer]` for layers with experts on the host; `slot_of` int [layers, experts]; `stream`: gives a device's
    stream to put the host part on, None = run it at once."""

    def __init__(
        self,
        host: dict[int, CpuExperts],
        device: GpuExperts,
        slot_of: np.ndarray,
        *,
        stream: Callable[[torch.device], DeviceStream] | None,
    ):
        self.host, self.device, self.stream = host, device, stream
        self.slot_of = torch.from_numpy(slot_of).to(device.slots.device)
        self._on_device = (slot_of >= 0).any(axis=1)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, clock=no_clock) -> Callable[[], Tensor]:
        """x [T, hidden], ids int64 [T, k], weights fp32 [T, k]. Returns join() → Σ_k w·E_k(x), fp32 [T, hidden]."""
        slots = self.slot_of[layer][ids]
        pending = None
        if layer in self.host:
            with clock("host_experts"):
                pending = self._start_host(layer, x, ids.masked_fill(slots >= 0, -1), weights)
        on_device = None
        if self._on_device[layer]:
            with clock("device_experts"):
                on_device = self.device(x, slots, weights)

        def join() -> Tensor:
            if pending is None:
                assert on_device is not None, f"layer {layer} has experts on neither tier"
                return on_device
            with clock("host_experts"):
                on_host = pending()
            return on_host if on_device is None else on_host + on_device

        return join

    def _start_host(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Callable[[], Tensor]:
        if self.stream is None:
            y = self.host[layer](x, ids, weights)
            return lambda: y
        return self.host[layer].start(self.stream(x.device), x, ids, weights)


def load_tiers(
    source: ModelWeights, experts: ExpertSource, slot_of: np.ndarray, *, device: str, pool: HostPool
) -> ExpertTiers:
    """Takes every routed expert once, to where `slot_of` puts it; the host keeps no copy of device experts."""
    layout = experts.layout
    tier = GpuExperts(layout, int(slot_of.max()) + 1, device)
    ids = range(slot_of.shape[1])
    host: dict[int, CpuExperts] = {}

    def place(packed: PackedExperts, layer: int, expert: int) -> None:
        slot = slot_of[layer, expert]
        if slot < 0:
            experts.place(packed, layer, expert)
        else:
            blob = torch.empty(layout.blob_bytes, dtype=torch.uint8)
            experts.fill(blob, layer, expert)
            tier.slots[slot].copy_(blob)

    with ThreadPoolExecutor(experts.loaders) as loaders:
        for layer in (i for i in source.layers if source.config.is_sparse(i)):
            resident = [e for e in ids if slot_of[layer, e] < 0]
            packed = PackedExperts(layout, len(ids), resident, () if experts.mapped else pool.nodes)
            for _ in loaders.map(lambda e, packed=packed, layer=layer: place(packed, layer, e), ids):
                source.tell("experts")
            if resident:
                host[layer] = CpuExperts(packed, pool=pool)
    return ExpertTiers(host, tier, slot_of, stream=None if tier.slots.device.type == "cpu" else CudaStream)
