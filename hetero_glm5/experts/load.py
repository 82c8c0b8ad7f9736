"""Loads routed experts into the two tiers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hetero_glm5.experts.cpu_tier import CpuExperts, HostPool
from hetero_glm5.experts.gpu_tier import GpuExperts
from hetero_glm5.experts.host_stream import CudaStream
from hetero_glm5.experts.tiers import ExpertTiers
from hetero_glm5.weights.expert_source import ExpertSource
from hetero_glm5.weights.load import ModelWeights
from hetero_glm5.weights.quantize import PackedExperts


def load_tiers(
    source: ModelWeights,
    experts: ExpertSource,
    slot_of: np.ndarray,
    *,
    device: str,
    pool: HostPool,
    copies: bool = False,
) -> ExpertTiers:
    """Takes every routed expert once, to where slot_of [MoE layers, experts] puts it. The host keeps a copy of those on
    the device only with `copies`, which experts that move need."""
    layout = experts.layout
    tier = GpuExperts(layout, int(slot_of.max(initial=-1)) + 1, device)
    ids = range(slot_of.shape[1])
    layers: Sequence[int] = [i for i in source.layers if source.config.is_sparse(i)]
    host: dict[int, CpuExperts] = {}

    def place(packed: PackedExperts, index: int, expert: int) -> None:
        layer, slot = layers[index], slot_of[index, expert]
        if slot < 0 or copies:
            experts.place(packed, layer, expert)
        if slot >= 0:
            blob = packed.read(expert) if copies else torch.empty(layout.blob_bytes, dtype=torch.uint8)
            if not copies:
                experts.fill(blob, layer, expert)
            tier.slots[slot].copy_(blob)

    with ThreadPoolExecutor(experts.loaders) as loaders:
        for index, layer in enumerate(layers):
            resident = [e for e in ids if copies or slot_of[index, e] < 0]
            packed = PackedExperts(layout, len(ids), resident, () if experts.mapped else pool.nodes)
            for _ in loaders.map(lambda e, packed=packed, index=index: place(packed, index, e), ids):
                source.tell("experts")
            if resident:
                host[layer] = CpuExperts(packed, pool=pool)
    stream = None if tier.slots.device.type == "cpu" else CudaStream
    return ExpertTiers(layers, host, tier, slot_of, stream=stream)
