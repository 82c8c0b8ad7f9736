"""INT4 checkpoints made of known codes and scales, in the layouts that are imported."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint
from torch import Tensor

KINDS = ("compressed-tensors", "gptq", "gptq_v2")
EXPERTS = ".mlp.experts."
LINEAR = ("_proj.weight", "_mqa.weight", ".wq_b.weight", ".wk.weight")


def draw(name: str, shape: tuple[int, int], group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """codes uint8 [N, K], 0..15, and scales [N, ceil(K/group)], some of them negative: a function of the name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    rows, cols = shape
    codes = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    scales = (torch.rand(rows, -(-cols // group), generator=generator) + 0.5) / (4.6 * cols**0.5)
    scales[torch.rand(scales.shape, generator=generator) < 0.1] *= -1
    return codes, scales.to(dtype)


def values(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """fp32 [N, K]."""
    out = codes.float() - 8
    for g in range(scales.shape[1]):
        out[:, g * group : (g + 1) * group] *= scales[:, g, None].float()
    return out


def words(codes: Tensor) -> Tensor:
    """[N, K] -> int32 [N, ceil(K/8)], the first code in the lowest bits."""
    rows, cols = codes.shape
    padded = torch.zeros(rows, -(-cols // 8) * 8, dtype=torch.int64)
    padded[:, :cols] = codes
    total = sum(padded[:, i::8] << 4 * i for i in range(8))
    return torch.where(total >= 1 << 31, total - (1 << 32), total).int()


def stored(kind: str, name: str, codes: Tensor, scales: Tensor, group: int) -> dict[str, Tensor]:
    """The tensors of one weight in a checkpoint."""
    if kind == "compressed-tensors":
        return {
            f"{name}_packed": words(codes),
            f"{name}_scale": scales,
            f"{name}_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
    zeros = torch.full((scales.shape[1], len(codes)), 7 if kind == "gptq" else 8)
    prefix = name.removesuffix("weight")
    return {
        f"{prefix}qweight": words(codes).T.contiguous(),
        f"{prefix}qzeros": words(zeros),
        f"{prefix}scales": scales.T.contiguous(),
        f"{prefix}g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // group,
    }


def quantization_config(kind: str, group: int) -> dict[str, Any]:
    if kind != "compressed-tensors":
        config = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False}
        return config | {"lm_head": False, "pack_dtype": "int32", "checkpoint_format": kind}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    weights |= {"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax"}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head", "re:.*self_attn.*"],
        "kv_cache_scheme": None,
    }


def int4_checkpoint(
    root: Path, kind: str, group: int = 32, dtype: torch.dtype = torch.bfloat16, dense: bool = False, **overrides: Any
) -> Path:
    """The tiny model (with `overrides`), its experts INT4 and, if `dense`, every other Linear weight too; written once
    below `root`. Beside it, with the ending -plain, lies the same model dequantised to fp32."""
    source = tiny_checkpoint(root, **overrides)
    folder = root / f"{source.name}-{kind}-{group}-{str(dtype)[6:]}-{dense}"
    if folder.exists():
        return folder
    plain_folder = folder.with_name(f"{folder.name}-plain")
    plain = load_file(str(source / "model.safetensors"))
    packed = {}
    for name, weight in list(plain.items()):
        if EXPERTS in name or (dense and name.endswith(LINEAR)):
            codes, scales = draw(name, tuple(weight.shape), group, dtype)
            plain[name] = values(codes, scales, group)
            packed |= stored(kind, name, codes, scales, group)
        else:
            packed[name] = weight
    config = json.loads((source / "config.json").read_text())
    for out, tensors, extra in (
        (plain_folder, plain, {}),
        (folder, packed, {"quantization_config": quantization_config(kind, group)}),
    ):
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
        (out / "config.json").write_text(json.dumps(config | extra))
        save_file(tensors, str(out / "model.safetensors"))
    return folder
