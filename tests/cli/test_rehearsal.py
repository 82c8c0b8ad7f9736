import pytest
from tiny import tiny_checkpoint

from hetero_glm5.cli import rehearsal
from hetero_glm5.cli.fitting import Experts, fit
from hetero_glm5.cli.rehearsal import config_data, rehearse
from hetero_glm5.config import EngineConfig
from hetero_glm5.hardware import probe
from hetero_glm5.model_config import ModelConfig


def rehearsed(folder, **flags):
    config = EngineConfig(model=str(folder), device="cpu", max_running_requests=1, chunked_prefill_size=128, **flags)
    model = ModelConfig.load(folder)
    found = fit(config, model, Experts.of(config, model), probe(gpu=False))
    return rehearse(found.settled, config_data(str(folder)), found.layout, found.share)


@pytest.mark.parametrize("method", ["BF16", "INT4", "FP8"])
def test_a_small_model_is_rehearsed_whole(checkpoints, monkeypatch, method):
    monkeypatch.setattr(rehearsal, "STEPS", 4)
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", fp8=method == "FP8")
    decoded, computed, rows = rehearsed(folder, kt_method=method, kt_num_gpu_experts=4)
    assert rows == 128 and len(decoded.steps) == 4 and len(computed.steps) == 2
    assert set(decoded.counts.values()) == {1.0}
    assert {"attention", "host_experts", "device_experts", "dense_mlp", "lm_head", "rest"} <= set(decoded.parts)
    assert sum(decoded.parts.values()) == pytest.approx(sum(decoded.steps) / 4)
    assert min(decoded.steps) > 0 and min(computed.steps) > 0


def test_of_a_large_model_two_layers_are_counted_up(checkpoints, monkeypatch):
    monkeypatch.setattr(rehearsal, "STEPS", 4)
    monkeypatch.setattr(rehearsal, "WHOLE_BYTES", 0)
    monkeypatch.setattr(rehearsal, "VOCAB", 300)
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", vocab_size=600)
    model = ModelConfig.load(folder)
    decoded, _, rows = rehearsed(folder)
    assert rows == max(rehearsal.PROMPT, 128 * model.num_experts_per_tok // model.n_routed_experts)
    layers, moe = model.num_hidden_layers, len(model.moe_layers)
    expected = {"attention": layers / 2, "host_experts": moe, "dense_mlp": layers - moe, "lm_head": 2.0, "rest": 1.0}
    assert {name: decoded.counts[name] for name in expected} == expected
    assert all(f"{name} " in decoded.formula for name in decoded.parts)
