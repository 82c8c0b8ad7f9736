"""What the engine tells of itself, as plain data: for /server_info and /metrics."""

from __future__ import annotations

import dataclasses
from typing import Any

from hetero_glm5.engine.engine import Engine


def snapshot(engine: Engine) -> dict[str, Any]:
    """Counts, and how full it is. For the engine's thread; cheap."""
    scheduler, counts = engine.scheduler, engine.scheduler.counts
    cache, drafter, tiers = scheduler.cache, engine.drafter, engine.tiers
    used = cache.pool.num_pages - cache.num_available
    return {
        "num_running_reqs": engine.num_running,
        "num_queue_reqs": engine.num_waiting,
        "num_pages": cache.pool.num_pages,
        "num_used_pages": used,
        "num_kept_pages": cache.num_kept,
        "token_usage": used / cache.pool.num_pages,
        "cache_hit_rate": counts.cached_tokens / max(counts.prompt_tokens, 1),
        "counts": dataclasses.asdict(counts),
        "avg_spec_accept_length": 1 + counts.accepted_tokens / max(counts.decoded_tokens, 1),
        "draft_acceptance": None if drafter is None else drafter.depth.acceptance,
        "page_store": None if engine.store is None else engine.store.stats,
        "expert_hit_rate": engine.recorder.hit_rate,
        "expert_routed_to": None if tiers.adaptation is None else tiers.adaptation.routed_to,
        "expert_copied_bytes": tiers.copied_bytes,
        "host_experts_bytes": tiers.reads.bytes,
        "host_experts_seconds": tiers.reads.seconds,
        "host_experts_gb_per_s": tiers.reads.gb_per_s,
    }


def settled(engine: Engine) -> dict[str, Any]:
    """What was decided at start: flags, and how the memory is used."""
    flags = dataclasses.asdict(engine.config)
    model = {"model_path": engine.config.model, "model_type": "glm_moe_dsa", "context_length": engine.context_length}
    plan = {"memory_plan": engine.memory.report(), "max_total_num_tokens": engine.memory.kv_tokens}
    return flags | model | plan
