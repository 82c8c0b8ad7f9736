"""The engine: one `step` computes one batch. One thread owns an engine; two engines can live in one process."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hetero_glm5 import _C, hardware
from hetero_glm5.config import EngineConfig
from hetero_glm5.core import (
    Batch,
    LoadProgress,
    RequestError,
    SamplingParams,
    Sequence,
    TokenEvent,
    UserError,
    no_clock,
)
from hetero_glm5.engine.batch import decoded_rows
from hetero_glm5.engine.kv_cache import PagePool
from hetero_glm5.engine.runner import Runner
from hetero_glm5.engine.sampler import sample
from hetero_glm5.engine.scheduler import Scheduler
from hetero_glm5.engine.stopping import Detokenizer, Stopping
from hetero_glm5.experts.calibrate import costs_here
from hetero_glm5.experts.counts import RoutingCounts
from hetero_glm5.experts.cpu_tier import HostPool
from hetero_glm5.experts.divided import STAGES
from hetero_glm5.experts.host_stream import HostStream
from hetero_glm5.experts.load import adapt, divide_prefills, load_tiers, pin
from hetero_glm5.experts.recording import Recording
from hetero_glm5.experts.tiers import ExpertTiers
from hetero_glm5.flags import ConfigError
from hetero_glm5.model.glm5 import GLM5
from hetero_glm5.model.state import Cache, Clocked, activation_bytes, cache_bytes_per_token
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.placement.cost import Costs, Curve
from hetero_glm5.placement.divide import threshold
from hetero_glm5.placement.memory import Limits, MemoryPlan, Needs, host_experts_fit, plan_memory
from hetero_glm5.placement.planner import Adaptive
from hetero_glm5.placement.policy import place, slots
from hetero_glm5.placement.record import DistributionRecorder
from hetero_glm5.placement.stats import load_counts
from hetero_glm5.weights.expert_store import ExpertStore, is_store
from hetero_glm5.weights.load import ModelWeights, Report, dense_bytes
from hetero_glm5.weights.quantize import ExpertLayout

log = logging.getLogger(__name__)

SAME_MEMORY, SAME_CORES, NO_LINK = 50e9, 1e12, 1.0  # bytes/s, FLOP/s, bytes/s: of both tiers on a CPU


class Engine:
    """Made by Engine.load. `clock` may be set to a core.Clock to measure the parts of each step."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        scheduler: Scheduler,
        tiers: ExpertTiers,
        pool: HostPool,
        recorder: DistributionRecorder,
    ):
        self.config, self.runner, self.scheduler, self.tiers, self.pool = config, runner, scheduler, tiers, pool
        self.model_config: ModelConfig = runner.model.config
        self.recorder = recorder
        self.clock: Clocked = no_clock
        self.batch = Batch([])  # what the latest step computed, or failed to

    def step(self) -> list[TokenEvent]:
        """Computes the next batch and returns an event for each sequence that got a token."""
        self.batch = Batch([])  # should schedule() fail, no sequence is to blame
        batch = self.batch = self.scheduler.schedule()
        if not batch:
            return []
        self.tiers.begin_step(decoded_rows(batch))
        logits = self.runner.forward(batch, self.clock)
        with self.clock("sampling"):
            tokens = sample(logits, batch, self.model_config.eos_token_ids)
        self.runner.wait()  # sampling does, but for a step from which no token is drawn
        self.pool.check()
        self.tiers.end_step()
        return self.scheduler.commit(batch, tokens)

    def fail_step(self, message: str) -> list[TokenEvent]:
        """After a step that raised: ends the sequences it was computing with error events; the others go on."""
        return self.scheduler.fail(self.batch, message)

    def add(self, tokens: list[int], params: SamplingParams, *, logits: bool = False) -> Sequence:
        """Queues a prompt. Raises RequestError or QueueFull. With `logits`, seq.logits collects those of the prompt."""
        self._check(tokens, params)
        seq = Sequence(list(tokens), params, len(tokens), logits=[] if logits else None)
        self.scheduler.add(seq)
        return seq

    def _check(self, tokens: list[int], params: SamplingParams) -> None:
        vocab = self.model_config.vocab_size
        if not tokens:
            raise RequestError("the prompt is empty; it needs at least one token.", "prompt")
        wrong = [t for t in tokens if type(t) is not int or not 0 <= t < vocab]
        if wrong:
            raise RequestError(
                f"the prompt holds token id {wrong[0]!r}; ids are whole numbers from 0 to {vocab - 1}.", "prompt"
            )
        room = self.context_length - len(tokens)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens; the context length is {self.context_length}, of which one must "
                "be left for the answer. Shorten the prompt, or start with a larger --context-length or "
                "--max-total-tokens.",
                "prompt",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise RequestError(
                f"max_tokens is {params.max_tokens}, but a prompt of {len(tokens)} tokens leaves {room} of the context "
                f"length {self.context_length}.",
                "max_tokens",
            )
        wrong = [t for t in params.stop_token_ids if not 0 <= t < vocab]
        if wrong:
            raise RequestError(f"stop_token_ids holds {wrong[0]}; ids lie between 0 and {vocab - 1}.", "stop_token_ids")
        if params.stop and self.scheduler.stopping.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids.", "stop")

    def abort(self, seq: Sequence) -> None:
        """Ends a sequence and frees its pages; nothing more is heard of it."""
        self.scheduler.abort(seq)

    @property
    def context_length(self) -> int:
        return self.scheduler.stopping.context_length

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def close(self) -> None:
        self.tiers.close()
        self.pool.close()

    @classmethod
    def load(
        cls, config: EngineConfig, tokenizer: Detokenizer | None = None, progress: Report = lambda progress: None
    ) -> Engine:
        """Reads the checkpoint, places the experts, sizes the KV pool. Raises UserError, if it can before reading."""
        if not config.model:
            raise ConfigError("--model is missing: give a checkpoint folder in Hugging Face format.")
        progress(LoadProgress("reading headers"))
        model_config = ModelConfig.load(config.model)
        if config.latent_norm_eps is not None:
            model_config = replace(model_config, latent_norm_eps=config.latent_norm_eps)
        machine = hardware.probe(gpu=config.device != "cpu")
        path = config.kt_weight_path
        store = ExpertStore(path) if path is not None and is_store(path) else None
        source = ModelWeights(model_config, config.model, experts=store or path, report=progress)
        try:
            config, notes = config.resolve(
                model_config,
                cuda=machine.cuda,
                node_cores={id: node.cores for id, node in machine.numa.items()},
                packed_as=store.layout.method if store else None,
                quantised_as=source.quantised_as,
            )
            for note in notes:
                log.info(note)
            return cls._load(config, source, source.layout(config.kt_method), machine, tokenizer)
        finally:
            source.close()

    @classmethod
    def _load(
        cls,
        config: EngineConfig,
        source: ModelWeights,
        layout: ExpertLayout,
        machine: hardware.Hardware,
        tokenizer: Detokenizer | None,
    ) -> Engine:
        model_config, dtype = source.config, getattr(torch, config.dtype)
        recorder = _recorder(config, model_config)
        slot_of = _placement(config, model_config)
        on_device = int(slot_of.max()) + 1
        if config.kt_enable_dynamic_expert_update and not on_device:
            raise ConfigError(
                "--kt-enable-dynamic-expert-update moves experts into the device's slots, and there are none. Raise "
                "--kt-num-gpu-experts or --kt-gpu-experts-ratio."
            )
        memory = _memory(config, source, layout, machine, on_device)
        context_length = _context_length(config, model_config, memory.kv_tokens)
        for line in memory.report():
            log.info(line)

        try:
            pool = HostPool(threads=config.kt_cpuinfer, nodes=config.kt_numa_nodes or ())
        except ValueError as error:  # HETERO_GLM5_ISA names what this machine lacks
            raise UserError(f"{error}.") from error
        log.info("%s: host experts %s on %d threads, ISA %s", machine.cpu, config.kt_method, pool.threads, pool.isa)
        if pool.nodes:
            log.info(_where_experts_live(pool, mapped=memory.needs.mapped))
        model = GLM5(model_config, source.getter(dtype, config.device))
        experts = source.experts(layout, mapped=memory.needs.mapped, on_device=on_device)
        tiers = load_tiers(source, experts, slot_of, device=config.device, pool=pool, copies=config.moves_experts)
        tiers.recording = Recording(recorder, RoutingCounts(len(slot_of), slot_of.shape[1], config.device))
        tiers.deferred = config.kt_max_deferred_experts_per_token
        if config.moves_experts:
            _set_up_moves(tiers, config, model_config, _costs(config, layout))
        cache = Cache.allocate(model_config, memory.kv_tokens, dtype=config.kv_cache_dtype, device=config.device)
        pages = PagePool(memory.kv_tokens // config.page_size, config.page_size)
        stopping = Stopping(model_config.eos_token_ids, context_length, tokenizer)
        runner = Runner(model, tiers, cache, config.page_size)
        return cls(config, runner, Scheduler(config, pages, stopping), tiers, pool, recorder)


def _recorder(config: EngineConfig, model: ModelConfig) -> DistributionRecorder:
    masks = config.expert_distribution_recorder_buffer_size if config.record_kt_gpu_expert_distribution else None
    return DistributionRecorder(model, config.expert_distribution_recorder_dir, masks)


def _costs(config: EngineConfig, layout: ExpertLayout) -> Costs:
    """Of both tiers; on a CPU they are the same cores, one after the other, so that no copy pays."""
    if config.device == "cpu":
        curve = Curve.roofline(SAME_MEMORY, SAME_CORES, layout.bits_per_weight)
        return Costs(layout.blob_bytes, curve, curve, link=NO_LINK)
    profile = None if config.kt_profile is None else Path(config.kt_profile)
    return costs_here(profile, layout, config.kt_cpuinfer, config.kt_numa_nodes or ())


def _set_up_moves(tiers: ExpertTiers, config: EngineConfig, model: ModelConfig, costs: Costs) -> None:
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
        if rows > _most_rows(config):
            log.warning(
                "--kt-gpu-prefill-token-threshold %s: no step has %d tokens, so none is divided; raise "
                "--chunked-prefill-size %d", flag, rows, config.chunked_prefill_size,
            )  # fmt: skip
        divide_prefills(tiers, rows, costs)


def _where_experts_live(pool: HostPool, *, mapped: bool) -> str:
    pairs = zip(pool.nodes, pool.node_threads, strict=True)
    nodes = "NUMA nodes " + ", ".join(f"{node} ({threads} threads)" for node, threads in pairs)
    if mapped:
        return f"{nodes}: the host experts stay in files, so the kernel places their pages; they are not divided"
    if not all(map(_C.binds_memory, pool.nodes)):
        return f"{nodes}: the kernel refuses to bind memory to them here, so host experts lie where it puts them"
    return f"{nodes}: each host expert is divided over them" if len(pool.nodes) > 1 else f"{nodes}: all host experts"


def _placement(config: EngineConfig, model: ModelConfig) -> np.ndarray:
    """slot_of [MoE layers, experts] for the strategy and budget that the flags name."""
    layers, experts = len(model.moe_layers), model.n_routed_experts
    budget = config.kt_num_gpu_experts * layers
    if config.kt_gpu_experts_ratio is not None:
        budget = int(config.kt_gpu_experts_ratio * layers * experts)
    counts = None
    if config.init_expert_location is not None:
        counts = load_counts(config.init_expert_location, model)
    return slots(place(config.kt_expert_placement_strategy, layers, experts, budget, counts))


def _memory(
    config: EngineConfig, source: ModelWeights, layout: ExpertLayout, machine: hardware.Hardware, on_device: int
) -> MemoryPlan:
    model, gpu = source.config, config.device == "cuda"
    needs = Needs(
        dense=dense_bytes(model, getattr(torch, config.dtype)),
        expert=layout.blob_bytes,
        device_experts=on_device,
        host_experts=len(model.moe_layers) * model.n_routed_experts - on_device,
        activations=activation_bytes(model, getattr(torch, config.dtype), _most_rows(config)),
        kv_token=cache_bytes_per_token(model, config.kv_cache_dtype),
        mapped=config.kt_weight_mode == "mmap",
        copies=config.moves_experts,
        staging=STAGES if config.divides_prefills else 0,
        pinned=_pinned_bytes(config, model) if gpu else 0,
    )
    limits = Limits(
        device=machine.gpu_free if gpu else machine.ram_available,
        host=machine.ram_available,
        shared=not gpu,
        fraction=config.mem_fraction_static,
        nodes=tuple(machine.numa[node].ram_available for node in config.kt_numa_nodes or ()),
    )
    pool = config.max_total_tokens or config.context_length or 1
    mappable = source.mappable and config.kt_weight_mode == "auto" and not config.moves_experts
    if mappable and not host_experts_fit(needs, limits, tokens=pool, page=config.page_size):
        log.info("the host experts do not fit in memory: they stay in the store's files and are read as they are used")
        needs = replace(needs, mapped=True)
    context = config.context_length or model.max_position_embeddings
    most = -(-context // config.page_size) * config.page_size * config.max_running_requests
    return plan_memory(needs, limits, wanted_tokens=config.max_total_tokens, most_tokens=most, page=config.page_size)


def _pinned_bytes(config: EngineConfig, model: ModelConfig) -> int:
    itemsize = getattr(torch, config.dtype).itemsize
    return HostStream.pinned_bytes(_most_rows(config), model.hidden_size, model.num_experts_per_tok, itemsize)


def _most_rows(config: EngineConfig) -> int:
    return config.chunked_prefill_size + config.max_running_requests


def _context_length(config: EngineConfig, model: ModelConfig, pool: int) -> int:
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
