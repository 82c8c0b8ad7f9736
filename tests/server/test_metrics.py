"""Metrics: what events and the engine's snapshot become."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hetero_glm5.core import SamplingParams, Sequence, TokenEvent
from hetero_glm5.server import metrics
from hetero_glm5.server.metrics import COUNTS, GAUGES, Metrics
from hetero_glm5.server.worker import Generation

SNAPSHOT = {name: i + 0.5 for i, name in enumerate(GAUGES)} | {
    "avg_spec_accept_length": 2.5,
    "counts": {name: i for i, name in enumerate(COUNTS)},
    "page_store": None,
    "expert_hit_rate": None,
    "expert_routed_to": None,
    "expert_copied_bytes": {"moved": 5, "fetched": 6, "streamed": 7},
    "host_experts_bytes": 0,
    "host_experts_seconds": 0.0,
    "host_experts_gb_per_s": None,
}


def values(told: Metrics) -> dict[str, float]:
    """By sample name, without the model's label."""
    samples = [s for family in text_string_to_metric_families(told.text().decode()) for s in family.samples]
    assert all(sample.labels.pop("model_name") == "a model" for sample in samples)
    return {" ".join([s.name, *s.labels.values()]): s.value for s in samples if "le" not in s.labels}


def test_latencies_and_tokens(monkeypatch):
    told, now = Metrics("a model"), [10.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    generation = Generation([[1]], SamplingParams(n=2))
    seq = Sequence([1], SamplingParams(), 1)
    for at, index, token, reason in (
        (12.0, 0, 5, None),
        (12.5, 0, 5, None),
        (13.0, 1, 5, "length"),
        (14.0, 0, 5, "stop"),
    ):
        now[0] = at
        told.observe(generation, index, TokenEvent(seq, token, "", reason))
    told.observe(Generation([[1]], SamplingParams()), 0, TokenEvent(seq, None, "", "abort"))
    found = values(told)
    assert found["hetero_glm5:generation_tokens_total"] == 4
    first, between = "hetero_glm5:time_to_first_token_seconds", "hetero_glm5:inter_token_latency_seconds"
    assert (found[f"{first}_count"], found[f"{first}_sum"]) == (2, pytest.approx(2 + 3))
    assert (found[f"{between}_count"], found[f"{between}_sum"]) == (2, pytest.approx(0.5 + 1.5))
    assert [found[f"hetero_glm5:num_requests_total {reason}"] for reason in ("length", "stop", "abort")] == [1, 1, 1]
    assert found["hetero_glm5:e2e_request_latency_seconds_count"] == 3


def test_what_the_engine_tells():
    told = Metrics("a model")
    assert not [name for name in values(told) if "num_running" in name], "nothing is known yet"
    told.snapshot = SNAPSHOT
    found = values(told)
    assert [found[f"hetero_glm5:{name}"] for name in GAUGES] == [0.5, 1.5, 2.5, 3.5, 4.5, 2.5]
    assert [found[f"hetero_glm5:{name}_total"] for name in COUNTS] == list(range(len(COUNTS)))
    assert found["hetero_glm5:expert_copied_bytes_total streamed"] == 7
    assert not [name for name in found if "host_experts" in name or "expert_selections" in name]
    told.snapshot = SNAPSHOT | {
        "expert_routed_to": {"device": 3, "host": 4},
        "host_experts_bytes": 100,
        "host_experts_seconds": 2.0,
        "host_experts_gb_per_s": 1.5,
    }
    found = values(told)
    assert found["hetero_glm5:expert_selections_total host"] == 4 and found["hetero_glm5:host_experts_gb_per_s"] == 1.5
    assert found["hetero_glm5:host_experts_bytes_total"] == 50 * found["hetero_glm5:host_experts_seconds_total"]
    told.snapshot = SNAPSHOT | {"page_store": {"host_pages": 3}, "expert_hit_rate": {"decode": 0.5, "prefill": None}}
    found = values(told)
    assert found["hetero_glm5:page_store host_pages"] == 3 and found["hetero_glm5:expert_hit_rate decode"] == 0.5
    assert "hetero_glm5:expert_hit_rate prefill" not in found
