"""Loads routed experts into the two tiers, and sets up what moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hetero_glm5.experts.adaptation import Adaptation
from hetero_glm5.experts.copies import Copies, copies_for
from hetero_glm5.experts.counts import RoutingCounts
from hetero_glm5.experts.cpu_tier import CpuExperts, HostPool
from hetero_glm5.experts.divided import DividedPrefill
from hetero_glm5.experts.gpu_tier import GpuExperts
from hetero_glm5.experts.host_stream import CudaStream
from hetero_glm5.experts.mover import Mover
from hetero_glm5.experts.tiers import ExpertTiers
from hetero_glm5.placement.cost import Costs
from hetero_glm5.placement.planner import Planner
from hetero_glm5.weights.expert_source import ExpertSource
from hetero_glm5.weights.load import ModelWeights
from hetero_glm5.weights.quantize import PackedExperts


def load_tiers(
    source: ModelWeights,
    experts: ExpertSource,
    slots: Mapping[int, np.ndarray],
    *,
    device: str,
    pool: HostPool,
    copies: bool = False,
) -> ExpertTiers:
    """Takes every routed expert of the model's layers `slots` once, to where slots[layer] [experts] puts it, -1 = the
    host. The host keeps a copy of those on the device only with `copies`, which experts that move need."""
    layout, layers, slot_of = experts.layout, list(slots), np.stack([*slots.values()])
    tier = GpuExperts(layout, int(slot_of.max(initial=-1)) + 1, device)
    ids = range(slot_of.shape[1])
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


def adapt(tiers: ExpertTiers, planner: Planner) -> None:
    """Lets the planner move the experts of tiers that were loaded with copies."""
    layers, experts = tiers.slot_of.shape
    device, new_copies = tiers.slot_of.device, _copies(tiers)
    mover = Mover(_packed(tiers), tiers.device.slots, new_copies(), new_copies())
    tiers.adaptation = Adaptation(planner, RoutingCounts(layers, experts, device), mover)


def divide_prefills(tiers: ExpertTiers, threshold: int, costs: Costs) -> None:
    """Divides the layers of steps of `threshold` rows or more; the tiers were loaded with copies."""
    tiers.divided = DividedPrefill(threshold, _packed(tiers), tiers.device, _copies(tiers)(), costs)


def pin(tiers: ExpertTiers) -> None:
    """Lets copies read the host's experts directly. UserError if that cannot be."""
    copies = _copies(tiers)()
    tiers.pinning.append(copies)
    for packed in _packed(tiers):
        for memory in packed.weights.memory:
            copies.pin(torch.from_numpy(memory))


def _packed(tiers: ExpertTiers) -> list[PackedExperts]:
    return [host.packed for host in tiers.host.values()]


def _copies(tiers: ExpertTiers) -> Callable[[], Copies]:
    return copies_for(tiers.slot_of.device)
