"""Decode and prefill of a model whose weights are not there, measured: the engine runs as much of it as this needs,
with random weights of the true shapes, and each part's time is multiplied by how often the model has that part.

A model of at most WHOLE_BYTES is rehearsed whole. Of a larger one, one dense and one MoE layer with once or twice as
many experts as a token needs: it decodes as the model does, and a prompt of T·E'/E tokens gives each of these E'
experts as many tokens as T give to the model's E. What no part names is a step's own and is counted once.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import Clock, SamplingParams, no_clock
from hetero_glm5.demo.random_checkpoint import write_checkpoint
from hetero_glm5.engine.engine import Engine
from hetero_glm5.model.host_step import most_few_rows
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.load import dense_bytes
from hetero_glm5.weights.quantize import ExpertLayout

WHOLE_BYTES, VOCAB = 256 << 20, 4096
PROMPT, WARMUP, STEPS = 128, 4, 24
BY_MOE, BY_VOCAB = ("router", "host_experts", "device_experts", "shared_expert"), ("lm_head", "sampling")


@dataclass(frozen=True)
class Rehearsed:
    """Seconds of the model's parts in a step, and of several whole steps that they were measured in (scaled alike)."""

    parts: dict[str, float]
    steps: list[float]
    counts: dict[str, float]  # how often the model has what was measured of each

    @property
    def seconds(self) -> float:
        return statistics.median(self.steps)

    @property
    def formula(self) -> str:
        words = [
            f"{name} {1e3 * value / self.counts[name]:.3f} ms"
            + (f" x {self.counts[name]:g}" if self.counts[name] != 1 else "")
            for name, value in sorted(self.parts.items(), key=lambda item: -item[1])
        ]
        return f"{' + '.join(words)} = {1e3 * self.seconds:.2f} ms"


def rehearse(
    config: EngineConfig, data: dict[str, Any], layout: ExpertLayout, share: float
) -> tuple[Rehearsed, Rehearsed, int]:
    """A decode step of one sequence, and a chunk of prefill with its length. config: settled; data: config.json."""
    model = ModelConfig.parse(data)
    small = _part_of(data, model, layout, config)
    cut, chunk = ModelConfig.parse(small), config.chunked_prefill_size
    many = most_few_rows(cut) + 1  # is not computed like a decode step
    rows = max(PROMPT, min(many, chunk), round(chunk * cut.n_routed_experts / model.n_routed_experts))
    with tempfile.TemporaryDirectory(prefix="hetero_glm5-plan-") as folder:
        path = write_checkpoint(Path(folder) / "model", small, dtype=config.dtype, fp8=config.kt_method == "FP8")
        engine = Engine.load(
            replace(
                _plain(config),
                model=str(path),
                kt_gpu_experts_ratio=share,
                max_running_requests=1,
                chunked_prefill_size=rows,
                max_total_tokens=rows + 4 * (WARMUP + STEPS),
            )
        )
        try:
            decoded = _steps(engine, [1] * PROMPT, WARMUP + STEPS)[WARMUP:]
            computed = [_steps(engine, _prompt(cut, rows, seed), 0)[0] for seed in range(3)][1:]
        finally:
            engine.close()
    counts = _counts(model, cut)
    return _scaled(decoded, counts), _scaled(computed, counts), rows


def _plain(config: EngineConfig) -> EngineConfig:
    """The same machine and formats, and nothing that depends on files or on more than a step."""
    kept = ("device", "dtype", "kt_method", "kt_cpuinfer", "kt_numa_nodes", "kv_cache_dtype", "mem_fraction_static")
    return EngineConfig(disable_radix_cache=True, **{name: getattr(config, name) for name in kept})


def _part_of(data: dict[str, Any], model: ModelConfig, layout: ExpertLayout, config: EngineConfig) -> dict[str, Any]:
    """What is rehearsed, as a config.json."""
    routed = len(model.moe_layers) * model.n_routed_experts * layout.blob_bytes
    data = data | {"num_nextn_predict_layers": 0}
    if dense_bytes(model, getattr(torch, config.dtype)) + routed <= WHOLE_BYTES:
        return data
    needed = max(model.num_experts_per_tok, 2) * model.n_group
    wanted = -(-PROMPT * model.n_routed_experts // config.chunked_prefill_size) // model.n_group * model.n_group
    experts = min(model.n_routed_experts, max(needed, min(wanted, 2 * needed)))
    for key in ("mlp_layer_types", "indexer_types", "index_topk_pattern"):
        data.pop(key, None)
    dense = model.num_hidden_layers > len(model.moe_layers)
    return data | {
        "num_hidden_layers": 1 + dense,
        "first_k_dense_replace": int(dense),
        "n_routed_experts": experts,
        "vocab_size": min(model.vocab_size, VOCAB),
        "eos_token_id": 0,
    }


def _counts(model: ModelConfig, cut: ModelConfig) -> dict[str, float]:
    layers, moe = model.num_hidden_layers / cut.num_hidden_layers, len(model.moe_layers) / len(cut.moe_layers)
    dense = model.num_hidden_layers - len(model.moe_layers)
    counts = {"attention": layers} | dict.fromkeys(BY_MOE, moe)
    counts["indexer"] = model.indexer_types.count("full") / cut.indexer_types.count("full")
    counts["dense_mlp"] = dense / max(1, cut.num_hidden_layers - len(cut.moe_layers))
    return counts | dict.fromkeys(BY_VOCAB, model.vocab_size / cut.vocab_size)


def _prompt(model: ModelConfig, rows: int, seed: int) -> list[int]:
    return torch.randint(model.vocab_size, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()


def _steps(engine: Engine, prompt: list[int], steps: int) -> list[tuple[float, dict[str, float]]]:
    """(seconds, seconds by part) of the prompt's step if `steps` is 0, else of so many decode steps after it. A clock
    waits for the device between parts and costs time itself: every other step goes without, and says how long it took.
    """
    params = SamplingParams(max_tokens=2 * steps + 2, temperature=0.0, ignore_eos=True)
    seq = engine.add(prompt, params)
    found = [] if steps else [_clocked(engine)]
    while not seq.decoding:
        engine.step()
    for _ in range(steps):
        engine.clock = no_clock
        seconds = _timed(engine)
        found.append((seconds, _clocked(engine)[1]))
    engine.abort(seq)
    return found


def _clocked(engine: Engine) -> tuple[float, dict[str, float]]:
    clock = engine.clock = Clock(engine.runner.wait)
    seconds = _timed(engine)
    engine.clock = no_clock
    return seconds, clock.seconds


def _timed(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def _scaled(steps: list[tuple[float, dict[str, float]]], counts: dict[str, float]) -> Rehearsed:
    """Each part's share of a step's clock is taken of the whole step, then multiplied."""
    parts: defaultdict[str, float] = defaultdict(float)
    totals = []
    for seconds, clocked in steps:
        named = sum(clocked.values())
        scale = min(1.0, seconds / named)
        mine = {name: scale * value * counts.get(name, 1.0) for name, value in clocked.items()}
        mine["rest"] = max(0.0, seconds - scale * named)
        totals.append(sum(mine.values()))
        for name, value in mine.items():
            parts[name] += value / len(steps)
    return Rehearsed(dict(parts), totals, {name: counts.get(name, 1.0) for name in parts})


def config_data(folder: str) -> dict[str, Any]:
    """The content of FOLDER/config.json."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
