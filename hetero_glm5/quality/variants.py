"""Copies of a checkpoint that differ in one thing, so that the engine can be asked what that costs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hetero_glm5.core import UserError
from hetero_glm5.model_config import ModelConfig, read_json
from hetero_glm5.weights.checkpoint import Checkpoint
from hetero_glm5.weights.load import ModelWeights
from hetero_glm5.weights.names import SCALE_SUFFIX, expected_tensors, expert_tensors
from hetero_glm5.weights.quantize import quantize_fp8

MOST_FP8_BYTES = 4 << 30


def dense_attention(folder: str, out: Path) -> str:
    """`folder` with an index_topk that no sequence exceeds, so that every row attends to all earlier ones."""
    for file in Path(folder).resolve().iterdir():
        (out / file.name).symlink_to(file)
    path = out / "config.json"
    config = read_json(path, f"{path} cannot be read")
    path.unlink()
    path.write_text(json.dumps(config | {"index_topk": config["max_position_embeddings"]}), encoding="utf-8")
    return str(out)


def fp8_experts(folder: str, out: Path) -> str:
    """Where the experts of `folder` are in FP8, as GLM-5-FP8 has them: there, or else in `out`. Raises UserError when a
    copy would be large."""
    config = ModelConfig.load(folder)
    weights = ModelWeights(config, folder)
    quantised_as = weights.quantised_as
    weights.close()
    if quantised_as == "FP8":
        return folder
    names = [name for layer in range(config.num_hidden_layers) for name in expert_tensors(config, layer)]
    size = 3 * config.hidden_size * config.moe_intermediate_size * config.n_routed_experts * len(config.moe_layers)
    if size > MOST_FP8_BYTES:
        raise UserError(
            f"the experts of {folder} would take {size >> 30} GiB in FP8; copies of at most {MOST_FP8_BYTES >> 30} GiB "
            "are made here. Leave FP8 out of --methods, or give the FP8 checkpoint."
        )
    source = Checkpoint(folder)
    source.check({}, expected_tensors(config, mtp=config.num_nextn_predict_layers > 0))
    tensors = {}
    for name in names:
        tensors[name], tensors[name + SCALE_SUFFIX] = quantize_fp8(source.read(name, torch.float32))
    source.close()
    save_file(tensors, str(out / "model.safetensors"))
    return str(out)
