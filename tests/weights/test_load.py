import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import GLM5
from tiny import tiny_checkpoint

from hetero_glm5.core import LoadProgress
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.checkpoint import Checkpoint, CheckpointError
from hetero_glm5.weights.expert_source import read_expert
from hetero_glm5.weights.load import ModelWeights, dense_bytes
from hetero_glm5.weights.names import expected_tensors, expert_tensors
from hetero_glm5.weights.quantize import ExpertLayout


def load_all(source: ModelWeights, dtype=torch.float32, mtp=False) -> int:
    """Reads everything the model wants; returns the bytes held afterwards, experts left out."""
    config = source.config
    weights, held = source.getter(dtype, "cpu"), 0
    routed = {name for layer in source.layers for name in expert_tensors(config, layer)}
    for name in expected_tensors(config, mtp):
        if name not in routed:
            held += weights(name).nbytes
    layout = ExpertLayout("BF16", config.hidden_size, config.moe_intermediate_size)
    experts, blob = source.experts(layout), torch.empty(layout.blob_bytes, dtype=torch.uint8)
    for layer in source.layers:
        for expert in range(config.n_routed_experts if config.is_sparse(layer) else 0):
            experts.fill(blob, layer, expert)
    return held


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_only_what_is_needed_is_read(checkpoints, mtp, fp8):
    folder = tiny_checkpoint(checkpoints, fp8=fp8)
    config, seen = ModelConfig.load(folder), []
    source = ModelWeights(config, str(folder), mtp=mtp, report=seen.append)
    assert load_all(source, mtp=mtp) == dense_bytes(config, torch.float32, mtp)
    done = source.progress
    assert done.bytes_done == done.bytes_total == source.dense_bytes + source.expert_bytes
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert (done.bytes_done > 0.95 * whole) == mtp
    assert all(a.bytes_done <= b.bytes_done for a, b in zip(seen, seen[1:], strict=False))


def test_progress_tells_rate_and_time_left():
    progress = LoadProgress("experts", 3_000_000_000, 12_000_000_000, 1.5)
    assert progress.gb_per_s == 2.0 and progress.eta_seconds == 4.5
    assert LoadProgress("start").eta_seconds is None


def test_a_checkpoint_without_its_mtp_layer_serves(checkpoints, tmp_path):
    """transformers drops the MTP layer when it saves; it is missed only by those who want it."""
    folder = tiny_checkpoint(checkpoints)
    tensors = {k: v for k, v in load_file(str(folder / "model.safetensors")).items() if ".layers.5." not in k}
    save_file(tensors, str(tmp_path / "model.safetensors"))
    config = ModelConfig.load(folder)
    load_all(ModelWeights(config, str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.5\."):
        ModelWeights(config, str(tmp_path), mtp=True)


def test_an_expert_that_mixes_types_is_refused(checkpoints, tmp_path):
    folder = tiny_checkpoint(checkpoints, fp8=True)
    tensors = load_file(str(folder / "model.safetensors"))
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)
    del tensors[name + "_scale_inv"]
    save_file(tensors, str(tmp_path / "model.safetensors"))
    checkpoint = Checkpoint(tmp_path)
    assert read_expert(checkpoint, 2, 0)[3] is not None
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.1\.\* mixes"):
        read_expert(checkpoint, 2, 1)


def test_bytes_of_glm5_outside_its_experts_are_38_gb():
    size = dense_bytes(ModelConfig.parse(GLM5), torch.bfloat16)
    router_in_fp32 = 75 * 256 * 6144 * 2
    norms_in_fp32 = 78 * (2 * 6144 + 2048 + 512 + 2 * 128) * 2 + 6144 * 2
    bias = 75 * 256 * 2
    assert round((size - router_in_fp32 - norms_in_fp32 - bias) / 1e9, 2) == 38.27
