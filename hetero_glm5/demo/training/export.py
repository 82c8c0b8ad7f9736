"""From a checkpoint of the training to a model in Hugging Face layout: BF16, biases of the routers F32."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hetero_glm5.core import UserError
from hetero_glm5.demo.chat_template import CHAT_TEMPLATE
from hetero_glm5.demo.tokenizer import tokenizer_config
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.names import EXPERT_MATRICES, expected_tensors, expert_prefix, layer_prefix


def export(
    state: dict[str, Tensor], config: dict[str, Any], tokenizer: Path, folder: Path, dtype=torch.bfloat16
) -> None:
    """Writes `folder`: weights, config.json, the files of the tokenizer, generation_config.json. Raises UserError where
    the state is not what a checkpoint of this config holds."""
    model = ModelConfig.parse(config)
    wanted = expected_tensors(model, mtp=True)
    tensors = dict(disk_tensors(state, model.num_hidden_layers))
    if wrong := wanted.keys() ^ tensors.keys():
        raise UserError(f"{sorted(wrong)[0]} is missing or not expected in a checkpoint of this config.")
    for name, spec in wanted.items():
        if tuple(tensors[name].shape) != spec.shape:
            raise UserError(f"{name} is {tuple(tensors[name].shape)}; {spec.shape} is expected.")
        tensors[name] = tensors[name].to(torch.float32 if spec.dtypes == ("F32",) else dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    save_file({name: tensors[name] for name in wanted}, weights, {"format": "pt"})
    weights.chmod(0o644)  # the library makes it private, and a package carries modes along
    _write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    generation = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", generation | {"do_sample": False})
    _write_json(folder / "tokenizer_config.json", tokenizer_config(model.max_position_embeddings))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def disk_tensors(state: dict[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    """The state of `Demo` under the names on disk; fused experts one by one."""
    prefix = layer_prefix(layers)
    for name, tensor in state.items():
        name = name.removeprefix("trunk.")
        name = re.sub(r"^mtp\.(layer\.)?", prefix, name)
        fused = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)", name)
        if not fused:
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = matrix.chunk(2) if fused[2] == "gate_up_proj" else (matrix,)
            names = EXPERT_MATRICES[:2] if len(parts) == 2 else EXPERT_MATRICES[2:]
            for part, own in zip(parts, names, strict=True):
                yield f"{expert_prefix(int(fused[1]), expert)}{own}.weight", part


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
