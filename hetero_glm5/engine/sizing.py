"""How much of what an engine holds: its config and weights in, a MemoryPlan out, before anything is read."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from hetero_glm5 import hardware
from hetero_glm5.config import EngineConfig
from hetero_glm5.core import UserError
from hetero_glm5.experts.divided import STAGES
from hetero_glm5.experts.host_stream import HostStream
from hetero_glm5.model.state import activation_bytes, cache_bytes_per_token
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.placement.memory import GIB, Limits, MemoryPlan, Needs, host_experts_fit, plan_memory
from hetero_glm5.weights.load import dense_bytes
from hetero_glm5.weights.quantize import ExpertLayout

log = logging.getLogger(__name__)


def plan(
    config: EngineConfig,
    model: ModelConfig,
    layout: ExpertLayout,
    machine: hardware.Hardware,
    on_device: int,
    *,
    mappable: bool,
) -> MemoryPlan:
    """Of a settled config; `on_device` experts have slots, the others are `mappable` if they can stay in files. Raises
    UserError when it does not fit."""
    gpu, mtp = config.device == "cuda", config.draft_depth > 0
    needs = Needs(
        dense=dense_bytes(model, getattr(torch, config.dtype), mtp),
        expert=layout.blob_bytes,
        device_experts=on_device,
        host_experts=(len(model.moe_layers) + mtp) * model.n_routed_experts - on_device,
        activations=activation_bytes(model, getattr(torch, config.dtype), most_rows(config)),
        kv_token=cache_bytes_per_token(model, config.kv_cache_dtype, mtp),
        mapped=config.kt_weight_mode == "mmap",
        copies=config.moves_experts,
        staging=STAGES if config.divides_prefills else 0,
        pinned=_pinned_bytes(config, model) if gpu else 0,
        kept_pages=int(config.kv_host_size * GIB),
    )
    limits = Limits(
        device=machine.gpu_free if gpu else machine.ram_available,
        host=machine.ram_available,
        shared=not gpu,
        fraction=config.mem_fraction_static,
        nodes=tuple(machine.numa[node].ram_available for node in config.kt_numa_nodes or ()),
    )
    pool = config.max_total_tokens or config.context_length or 1
    may_map = mappable and config.kt_weight_mode == "auto" and not config.moves_experts
    if may_map and not host_experts_fit(needs, limits, tokens=pool, page=config.page_size):
        log.info("the host experts do not fit in memory: they stay in the store's files and are read as they are used")
        needs = replace(needs, mapped=True)
    context = config.context_length or model.max_position_embeddings
    most = -(-context // config.page_size) * config.page_size * config.max_running_requests
    return plan_memory(needs, limits, wanted_tokens=config.max_total_tokens, most_tokens=most, page=config.page_size)


def most_rows(config: EngineConfig) -> int:
    """Rows of a step."""
    return config.chunked_prefill_size + config.max_running_requests * (1 + config.draft_depth)


def context_length(config: EngineConfig, model: ModelConfig, pool: int) -> int:
    """What was asked for must fit into the pool; what was not is lowered to it, and told."""
    if config.context_length is not None and config.context_length > pool:
        raise UserError(
            f"--context-length is {config.context_length}, but the KV pool holds {pool} tokens. Raise "
            "--max-total-tokens or --mem-fraction-static, or lower --context-length."
        )
    wanted = config.context_length or model.max_position_embeddings
    if wanted > pool:
        log.info("context length %d of the model's %d: that is what the KV pool holds", pool, wanted)
    return min(wanted, pool)


def _pinned_bytes(config: EngineConfig, model: ModelConfig) -> int:
    itemsize = getattr(torch, config.dtype).itemsize
    return HostStream.pinned_bytes(most_rows(config), model.hidden_size, model.num_experts_per_tok, itemsize)
