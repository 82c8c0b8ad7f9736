"""The engine: one `step` computes one batch. One thread owns an engine; two engines can live in one process."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hetero_glm5 import hardware
from hetero_glm5.config import KV_DISK_GIB, EngineConfig
from hetero_glm5.core import (
    Batch,
    Drawn,
    Grammar,
    LoadProgress,
    PromptTooLong,
    QueueFull,
    RequestError,
    SamplingParams,
    Sequence,
    TokenEvent,
    UserError,
    no_clock,
)
from hetero_glm5.engine import sizing
from hetero_glm5.engine.batch import BatchTensors, decoded_rows
from hetero_glm5.engine.draft_depth import DraftDepth
from hetero_glm5.engine.kv_cache import PagePool
from hetero_glm5.engine.page_store import PageStore
from hetero_glm5.engine.prefix_cache import PrefixCache
from hetero_glm5.engine.residency import set_up_moves, starting_slots, where_experts_live
from hetero_glm5.engine.runner import Runner
from hetero_glm5.engine.sampler import Sampler
from hetero_glm5.engine.scheduler import INVALID_TOKEN, Scheduler
from hetero_glm5.engine.speculative import Computed, Drafter
from hetero_glm5.engine.stopping import Detokenizer, Stopping
from hetero_glm5.experts.counts import RoutingCounts
from hetero_glm5.experts.cpu_tier import HostPool
from hetero_glm5.experts.load import load_tiers
from hetero_glm5.experts.recording import Recording
from hetero_glm5.experts.tiers import ExpertTiers
from hetero_glm5.flags import ConfigError
from hetero_glm5.model.few_rows import FewRows
from hetero_glm5.model.glm5 import GLM5
from hetero_glm5.model.mtp import MTP
from hetero_glm5.model.state import Cache, Clocked
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.placement.memory import GIB, MemoryPlan
from hetero_glm5.placement.record import DistributionRecorder
from hetero_glm5.weights.expert_store import ExpertStore, is_store
from hetero_glm5.weights.load import ModelWeights, Report
from hetero_glm5.weights.quantize import ExpertLayout

log = logging.getLogger(__name__)

STORE_PATIENCE = 0.002  # seconds between two looks at pages that are being read


class Engine:
    """Made by Engine.load, which sets what may be missing: the drafter, and the page store. `clock` may be set to a
    core.Clock to measure the parts of each step."""

    pool: HostPool
    memory: MemoryPlan

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        tiers: ExpertTiers,
        recorder: DistributionRecorder,
    ):
        self.config, self.runner, self.scheduler, self.sampler = config, runner, scheduler, sampler
        self.tiers, self.recorder = tiers, recorder
        self.model_config: ModelConfig = runner.model.config
        self.drafter: Drafter | None = None
        self.store: PageStore | None = None  # the scheduler's
        self.clock: Clocked = no_clock
        self.batch = Batch([])  # what the latest step computed, or failed to
        self._computed: Computed | None = None  # what the latest step leaves to do

    def step(self) -> list[TokenEvent]:
        """Computes the next batch and returns an event for each token that a sequence got."""
        self._follow_up()
        self.batch = Batch([])  # should schedule() fail, no sequence is to blame
        if late := self.scheduler.expire(time.monotonic()):
            return late
        batch = self.batch = self.scheduler.schedule()
        if not batch:
            return self._idle()
        started = time.perf_counter()
        self.tiers.begin_step(decoded_rows(batch))
        logits = self.runner.forward(batch, self.clock)
        with self.clock("sampling"):
            drawn = self.sampler(logits, batch)
            for i in self.runner.unsound(batch):
                drawn[i] = [Drawn(INVALID_TOKEN)]
        self.runner.wait()  # sampling does, but for a step from which no token is drawn
        self.pool.check()
        self.tiers.end_step()
        self._time(batch, drawn, time.perf_counter() - started)
        if self.drafter is not None or self.store is not None:
            self._computed = self.runner.computed
        return self.scheduler.commit(batch, drawn)

    def _follow_up(self) -> None:
        """What the latest step leaves to do once its tokens have been told: drafts, and keeping its pages."""
        computed, self._computed = self._computed, None
        if self.drafter is not None and computed is not None:
            with self.clock("drafts"):
                self.drafter.draft(computed, self.scheduler.cache.grow, self.context_length)
        self._keep_pages()

    def _keep_pages(self) -> None:
        """Gives the page store the pages that were filled since the last time."""
        fresh = self.scheduler.cache.take_fresh()
        if self.store is None or not fresh:
            return
        if self.drafter is not None:
            self.drafter.catch_up(self.clock)
        fresh = [node for node in fresh if node.key not in self.store]
        contents = self.runner.read_pages([node.page for node in fresh]).numpy()
        for node, content in zip(fresh, contents, strict=True):
            self.store.put(node.key, content.copy())

    def _idle(self) -> list[TokenEvent]:
        """Nothing can be computed: if pages are being read that a sequence waits for, gives them time."""
        if self.scheduler.restoring.waits:
            time.sleep(STORE_PATIENCE)
        return []

    def _time(self, batch: Batch, drawn: list[list[Drawn]], seconds: float) -> None:
        """Tells the drafter what a step that only decodes has cost and gained."""
        if self.drafter is not None and batch.chunks and batch.decodes:
            self.drafter.depth.stepped(sum(chunk.num_rows for chunk in batch.chunks), seconds)
            for chunk, tokens in zip(batch.chunks, drawn, strict=True):
                self.drafter.depth.verified(len(chunk.drafts), len(tokens) - 1)

    def fail_step(self, message: str) -> list[TokenEvent]:
        """After a step that raised: ends the sequences it was computing with error events; the others go on."""
        self._computed = None
        return self.scheduler.fail(self.batch, message)

    def compile(self, grammar: Grammar) -> None:
        """What may take long of `add`, seconds at worst. For any thread, unlike all else. Raises RequestError."""
        self.sampler.compile(grammar)

    def add(
        self,
        tokens: list[int],
        params: SamplingParams,
        *,
        logits: bool = False,
        salt: str | None = None,
        timeout: float | None = None,
    ) -> Sequence:
        """Queues a prompt. Raises RequestError or QueueFull. With `logits`, seq.logits collects those of the prompt.
        Prefixes are shared among sequences of one `salt`. After `timeout` seconds the sequence ends with an error."""
        self._check(tokens, params)
        seq = Sequence(list(tokens), params, len(tokens), salt=salt, logits=[] if logits else None)
        if params.prompt_logprobs is not None:
            seq.prompt_logprobs = []
        if timeout is not None:
            seq.deadline = time.monotonic() + timeout
        self.sampler.prepare(seq)
        try:
            self.scheduler.add(seq)
        except QueueFull:
            self.sampler.forget(seq)
            raise
        return seq

    def add_all(self, tokens: list[int], params: SamplingParams, **options: Any) -> list[Sequence]:
        """Queues a prompt params.n times, all or none; each draws from a seed of its own."""
        most = self.config.max_queued_requests
        if params.n > most:
            raise RequestError(f"n is {params.n}; at most {most} can wait (--max-queued-requests).", "n")
        added: list[Sequence] = []
        try:
            for i in range(params.n):
                seed = None if params.seed is None else (params.seed + i) % 2**64
                added.append(self.add(tokens, replace(params, n=1, seed=seed), **options))
        except BaseException:
            for seq in added:
                self.abort(seq)
            raise
        return added

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
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens > {self.context_length} maximum. This model's maximum context "
                f"length is {self.context_length} tokens, one of them for the answer. Shorten the prompt, or start "
                "with a larger --context-length or --max-total-tokens.",
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

    def flush_cache(self) -> None:
        """Forgets the prefixes that no running sequence uses. Pages in the page store stay."""
        self.scheduler.cache.clear()

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
        """Whether step() has something to do."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._computed)

    def close(self) -> None:
        """Pages on their way to the disk get there."""
        try:
            if self.store is not None:
                self._keep_pages()
                self.store.close()
        finally:
            self.sampler.close()
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
        mtp = config.draft_depth > 0 and model_config.num_nextn_predict_layers > 0
        source = ModelWeights(model_config, config.model, experts=store or path, mtp=mtp, report=progress)
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
        slot_of = starting_slots(config, model_config)
        on_device = int(slot_of.max()) + 1
        memory = sizing.plan(config, model_config, layout, machine, on_device, mappable=source.mappable)
        context_length = sizing.context_length(config, model_config, memory.kv_tokens)
        for line in memory.report():
            log.info(line)

        try:
            pool = HostPool(threads=config.kt_cpuinfer, nodes=config.kt_numa_nodes or ())
        except ValueError as error:  # HETERO_GLM5_ISA names what this machine lacks
            raise UserError(f"{error}.") from error
        log.info("%s: host experts %s on %d threads, ISA %s", machine.cpu, config.kt_method, pool.threads, pool.isa)
        if pool.nodes:
            log.info(where_experts_live(pool, mapped=memory.needs.mapped))
        weights = source.getter(dtype, config.device)
        few = FewRows(model_config, pool.handle) if config.device == "cpu" else None
        model = GLM5(model_config, weights, few)
        experts = source.experts(layout, mapped=memory.needs.mapped, on_device=on_device)
        by_layer = dict(zip(model_config.moe_layers, slot_of, strict=True))
        tiers = load_tiers(source, experts, by_layer, device=config.device, pool=pool, copies=config.moves_experts)
        tiers.recording = Recording(recorder, RoutingCounts(len(slot_of), slot_of.shape[1], config.device))
        tiers.deferred = config.kt_max_deferred_experts_per_token
        if config.moves_experts:
            set_up_moves(tiers, config, model_config, layout)
        cache = Cache.allocate(
            model_config,
            memory.kv_tokens,
            dtype=config.kv_cache_dtype,
            device=config.device,
            mtp=config.draft_depth > 0,
        )
        tensors = BatchTensors(config, sizing.most_rows(config), context_length)
        runner = Runner(model, tiers, cache, tensors)
        store = _page_store(config, source, cache)
        prefixes = PrefixCache(
            PagePool(memory.kv_tokens // config.page_size, config.page_size),
            enabled=not config.disable_radix_cache,
            key=None if store is None else store.key,
        )
        stopping = Stopping(model_config.eos_token_ids, context_length, tokenizer)
        sampler = Sampler(model_config.eos_token_ids, tokenizer, model_config.vocab_size)
        scheduler = Scheduler(config, prefixes, stopping, store, sampler.forget)
        engine = cls(config, runner, scheduler, sampler, tiers, recorder)
        engine.pool, engine.store, engine.memory = pool, store, memory
        if config.draft_depth:
            layer = {model_config.num_hidden_layers: np.full(model_config.n_routed_experts, -1)}
            own = load_tiers(source, experts, layer, device=config.device, pool=pool)
            engine.drafter = Drafter(MTP(model, weights), own, cache, tensors, DraftDepth(config.draft_depth))
        return engine


def _page_store(config: EngineConfig, source: ModelWeights, cache: Cache) -> PageStore | None:
    if not config.kv_host_size and config.kv_disk_path is None:
        return None
    disk = None if config.kv_disk_path is None else Path(config.kv_disk_path)
    gib = KV_DISK_GIB if config.kv_disk_size is None else config.kv_disk_size
    decides = (config.dtype, config.kv_cache_dtype, config.kt_method, config.page_size, config.draft_depth > 0)
    settings = (*decides, config.latent_norm_eps, config.kt_max_deferred_experts_per_token)
    return PageStore(
        source.fingerprint() + repr(settings).encode(),
        cache.page_bytes(config.page_size),
        host_bytes=int(config.kv_host_size * GIB),
        disk=disk,
        disk_bytes=int(gib * GIB) if disk is not None else 0,
    )


def _recorder(config: EngineConfig, model: ModelConfig) -> DistributionRecorder:
    masks = config.expert_distribution_recorder_buffer_size if config.record_kt_gpu_expert_distribution else None
    return DistributionRecorder(model, config.expert_distribution_recorder_dir, masks)
