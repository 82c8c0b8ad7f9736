"""Which experts start on the device, and what will move them: flags and measurements in, settled tiers out."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from hetero_glm5 import _C
from hetero_glm5.config import EngineConfig
from hetero_glm5.engine.sizing import most_rows
from hetero_glm5.experts.calibrate import costs_here
from hetero_glm5.experts.cpu_tier import HostPool
from hetero_glm5.experts.load import adapt, divide_prefills, pin
from hetero_glm5.experts.tiers import ExpertTiers
from hetero_glm5.flags import ConfigError
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.placement.cost import Costs, Curve
from hetero_glm5.placement.divide import threshold
from hetero_glm5.placement.planner import Adaptive
from hetero_glm5.placement.policy import place, slots
from hetero_glm5.placement.stats import load_counts
from hetero_glm5.weights.quantize import ExpertLayout

log = logging.getLogger(__name__)

SAME_MEMORY, SAME_CORES, NO_LINK = 50e9, 1e12, 1.0  # bytes/s, FLOP/s, bytes/s: of both tiers on a CPU


def starting_slots(config: EngineConfig, model: ModelConfig) -> np.ndarray:
    """slot_of [MoE layers, experts] for the strategy and budget that the flags name."""
    layers, experts = len(model.moe_layers), model.n_routed_experts
    budget = config.kt_num_gpu_experts * layers
    if config.kt_gpu_experts_ratio is not None:
        budget = int(config.kt_gpu_experts_ratio * layers * experts)
    if config.kt_enable_dynamic_expert_update and not budget:
        raise ConfigError(
            "--kt-enable-dynamic-expert-update moves experts into the device's slots, and there are none. Raise "
            "--kt-num-gpu-experts or --kt-gpu-experts-ratio."
        )
    counts = None
    if config.init_expert_location is not None:
        counts = load_counts(config.init_expert_location, model)
    return slots(place(config.kt_expert_placement_strategy, layers, experts, budget, counts))


def set_up_moves(tiers: ExpertTiers, config: EngineConfig, model: ModelConfig, layout: ExpertLayout) -> None:
    """Of tiers that were loaded with copies."""
    costs = _costs(config, layout)
    pin(tiers)
    if config.kt_enable_dynamic_expert_update:
        adapt(tiers, Adaptive(tiers.slot_of.numpy(force=True), costs))
    flag = config.kt_gpu_prefill_token_threshold
    if flag == "auto":
        resident = float((tiers.slot_of >= 0).float().mean())
        rows = threshold(costs, model.num_experts_per_tok, np.ones(model.n_routed_experts), resident)
        log.info("--kt-gpu-prefill-token-threshold auto: %s", "never" if rows is None else f"{rows} tokens")
    else:
        rows = int(flag) or None
    if rows is not None:
        if rows > most_rows(config):
            log.warning(
                "--kt-gpu-prefill-token-threshold %s: no step has %d tokens, so none is divided; raise "
                "--chunked-prefill-size %d", flag, rows, config.chunked_prefill_size,
            )  # fmt: skip
        divide_prefills(tiers, rows, costs)


def where_experts_live(pool: HostPool, *, mapped: bool) -> str:
    """The host's experts over NUMA nodes, for the start log."""
    pairs = zip(pool.nodes, pool.node_threads, strict=True)
    nodes = "NUMA nodes " + ", ".join(f"{node} ({threads} threads)" for node, threads in pairs)
    if mapped:
        return f"{nodes}: the host experts stay in files, so the kernel places their pages; they are not divided"
    if not all(map(_C.binds_memory, pool.nodes)):
        return f"{nodes}: the kernel refuses to bind memory to them here, so host experts lie where it puts them"
    return f"{nodes}: each host expert is divided over them" if len(pool.nodes) > 1 else f"{nodes}: all host experts"


def _costs(config: EngineConfig, layout: ExpertLayout) -> Costs:
    """Of both tiers; on a CPU they are the same cores, one after the other, so that no copy pays."""
    if config.device == "cpu":
        curve = Curve.roofline(SAME_MEMORY, SAME_CORES, layout.bits_per_weight)
        return Costs(layout.blob_bytes, curve, curve, link=NO_LINK)
    profile = None if config.kt_profile is None else Path(config.kt_profile)
    return costs_here(profile, layout, config.kt_cpuinfer, config.kt_numa_nodes or ())
