"""Prometheus metrics, in the names of the field (SGLang's) under the prefix hetero_glm5.

Latencies and tokens are counted from events as they come, on the loop's thread; the rest is what the engine last told
of itself (info.snapshot).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hetero_glm5.core import TokenEvent
from hetero_glm5.server.worker import Generation

PREFIX = "hetero_glm5"
FIRST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds
BETWEEN = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
WHOLE = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
GAUGES = {  # of the snapshot
    "num_running_reqs": "Requests being computed.",
    "num_queue_reqs": "Requests waiting.",
    "token_usage": "Share of the KV pool that running requests hold.",
    "num_kept_pages": "Pages of the KV pool kept for reuse that no running request holds.",
    "cache_hit_rate": "Share of prompt tokens that were cached, since the start.",
    "spec_accept_length": "Tokens that a decode step gives a request, since the start.",
}
COUNTS = {  # of the scheduler's Counts
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were cached.",
    "restored_tokens": "Tokens of prompts that came from the page store.",
    "prefilled_tokens": "Tokens of prompts that were computed.",
    "drafted_tokens": "Tokens drafted ahead.",
    "accepted_tokens": "Tokens drafted ahead that were right.",
    "preemptions": "Requests that had to make room.",
}

HOST_EXPERTS = {
    "host_experts_bytes": "Bytes of weights that the host's experts read.",
    "host_experts_seconds": "Seconds that the host's experts took.",
}


class Metrics:
    """One registry for one server. Everything on the loop's thread."""

    def __init__(self, model: str):
        self.snapshot: dict[str, Any] | None = None  # the engine's latest
        self._labels = {"model_name": model}
        self._registry = CollectorRegistry()
        self._registry.register(self)  # type: ignore[arg-type]
        self._ttft = self._histogram("time_to_first_token_seconds", "From a request to its first token.", FIRST)
        self._between = self._histogram("inter_token_latency_seconds", "From a token to the next.", BETWEEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From a request to an answer's end.", WHOLE)
        self._tokens = self._counter("generation_tokens", "Tokens generated.").labels(**self._labels)
        self._ended = self._counter("num_requests", "Answers that have ended.", "finish_reason")
        self._last: WeakKeyDictionary[Generation, dict[int, float]] = WeakKeyDictionary()

    def observe(self, generation: Generation, index: int, event: TokenEvent) -> None:
        """EngineWorker.observe."""
        now, last = time.monotonic(), self._last.setdefault(generation, {})
        if event.token is not None:
            self._tokens.inc()
            if index in last:
                self._between.observe(now - last[index])
            else:
                self._ttft.observe(now - generation.submitted)
            last[index] = now
        if event.finish_reason is not None:
            self._whole.observe(now - generation.submitted)
            self._ended.labels(**self._labels, finish_reason=event.finish_reason).inc()

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the snapshot says; called by the registry."""
        if self.snapshot is None:
            return
        told = self.snapshot | {"spec_accept_length": self.snapshot["avg_spec_accept_length"]}
        for name, help in GAUGES.items():
            yield self._told(GaugeMetricFamily, name, help, {(): told[name]})
        for name, help in COUNTS.items():
            yield self._told(CounterMetricFamily, name, help, {(): told["counts"][name]})
        rates = {(phase,): rate for phase, rate in (told["expert_hit_rate"] or {}).items() if rate is not None}
        if rates:
            help = "Of the experts chosen while the expert distribution was recorded, the share found on the device."
            yield self._told(GaugeMetricFamily, "expert_hit_rate", help, rates, "phase")
        if told["expert_routed_to"] is not None:
            hits = {(tier,): count for tier, count in told["expert_routed_to"].items()}
            help = "Experts chosen, while experts may move, by the tier that held them."
            yield self._told(CounterMetricFamily, "expert_selections", help, hits, "tier")
        copied = {(reason,): count for reason, count in told["expert_copied_bytes"].items()}
        help = "Bytes of experts copied from the host to the device."
        yield self._told(CounterMetricFamily, "expert_copied_bytes", help, copied, "reason")
        yield from self._host_experts(told)
        if told["page_store"] is not None:
            stats = {(name,): value for name, value in told["page_store"].items()}
            yield self._told(GaugeMetricFamily, "page_store", "Pages outside the KV pool.", stats, "stat")

    def _host_experts(self, told: dict[str, Any]) -> Iterator[Metric]:
        """Nothing where the host's experts run in a device's stream, in which they are not timed."""
        if told["host_experts_gb_per_s"] is None:
            return
        for name, help in HOST_EXPERTS.items():
            yield self._told(CounterMetricFamily, name, help, {(): told[name]})
        help = "GB/s of weights that the host's experts read in the latest step that only decoded."
        yield self._told(GaugeMetricFamily, "host_experts_gb_per_s", help, {(): told["host_experts_gb_per_s"]})

    def _told(self, kind: Any, name: str, help: str, values: dict[Any, float], *labels: str) -> Metric:
        family = kind(f"{PREFIX}:{name}", help, labels=[*self._labels, *labels])
        for label_values, value in values.items():
            family.add_metric([*self._labels.values(), *label_values], value)
        return family

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"{PREFIX}:{name}", help, list(self._labels), buckets=buckets, registry=self._registry)
        return made.labels(**self._labels)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}:{name}", help, [*self._labels, *labels], registry=self._registry)
