"""A tiny model to train and data for it, shared by the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.demo.tokenizer import build_tokenizer
from hetero_glm5.demo.training.data import file_path
from hetero_glm5.demo.training.loop import Plan

VOCAB = 320


def training_config(**overrides: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "qk_head_dim": 24,
        "v_head_dim": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "index_head_dim": 16,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB,
        "eos_token_id": [VOCAB - 36],
        "pad_token_id": VOCAB - 36,
    }
    return tiny_config(**sizes, **overrides)


def write_toy_data(folder: Path, files: int = 2, documents: int = 120) -> None:
    """Documents that repeat four random ids: the second half of each is the model's to write."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(VOCAB).save(str(folder / "tokenizer.json"))
    for split, count in (("held-out", 1), ("train", files)):
        for number in range(count):
            rng = np.random.default_rng((number, count))
            lengths = rng.integers(3, 12, documents) * 4
            ids = [np.tile(rng.integers(0, 40, 4), n // 4) for n in lengths]
            np.savez(
                file_path(folder, split, number),
                tokens=np.concatenate(ids).astype(np.uint16),
                written=np.concatenate([np.arange(n) >= n // 2 for n in lengths]),
                ends=np.cumsum(lengths),
                kinds=rng.integers(0, 6, documents).astype(np.uint8),
            )


def toy_plan(folder: Path, stage: str = "dense", steps: int = 6, **changes: Any) -> Plan:
    options = {"config": training_config(), "tokens": 512 * steps, "workers": 1, "length": 512, "files": 2}
    options |= {"compiled": False, "log_every": 1, "eval_every": 10**9} | changes
    return Plan(out=folder, stage=stage, **options)


def spans_of(*lengths: int) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """Spans of documents of these lengths, one after the other, and each token's position."""
    ends = np.cumsum(lengths).tolist()
    positions = torch.cat([torch.arange(n) for n in lengths])
    return list(zip([0, *ends[:-1]], ends, strict=True)), positions
