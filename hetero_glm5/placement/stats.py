"""Routing statistics: how often each expert of each layer was chosen, and the files they are kept in.

A file, .safetensors or .pt, holds `logical_count` [1, layers, experts] for all layers, dense ones zero: what SGLang's
expert-distribution recorder writes (one for each step; they are summed) and what --init-expert-location reads. Beside
it stand `decode_count` and `prefill_count` [layers, experts], its two parts.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hetero_glm5.core import UserError
from hetero_glm5.model_config import ModelConfig

PHASES = ("decode", "prefill")
KEY, PHASE_KEYS = "logical_count", ("decode_count", "prefill_count")


class RoutingStats:
    """Selections of every expert, decode and prefill apart."""

    def __init__(self, model: ModelConfig):
        self.model = model
        self.counts = np.zeros((2, len(model.moe_layers), model.n_routed_experts), dtype=np.int64)  # decode, prefill

    def add(self, decode: np.ndarray, prefill: np.ndarray) -> None:
        """The counts of a step, or of several together, int64 [MoE layers, experts] each."""
        self.counts += np.stack([decode, prefill])

    @property
    def tokens(self) -> tuple[float, float]:
        """Of decode and of prefill."""
        _, layers, _ = self.counts.shape
        decode, prefill = (self.counts.sum(axis=(1, 2)) / (layers * self.model.num_experts_per_tok)).tolist()
        return decode, prefill

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """What a file holds, int64."""
        decode, prefill = all_layers(self.counts, self.model)
        return {KEY: (decode + prefill)[None]} | dict(zip(PHASE_KEYS, (decode, prefill), strict=True))


def all_layers(of_moe_layers: np.ndarray, model: ModelConfig) -> np.ndarray:
    """[..., MoE layers, experts] -> [..., layers, experts], zero where a layer is dense."""
    *outer, _, experts = of_moe_layers.shape
    whole = np.zeros((*outer, model.num_hidden_layers, experts), of_moe_layers.dtype)
    whole[..., list(model.moe_layers), :] = of_moe_layers
    return whole


def load_counts(path: str, model: ModelConfig) -> np.ndarray:
    """float64 [MoE layers, experts] from a .safetensors or .pt file with `logical_count` [..., layers, experts] for all
    layers; only MoE layers is fine too. Raises UserError."""
    name = f"--init-expert-location {path}"
    data = _read(Path(path), name)
    counts = data.get(KEY) if isinstance(data, dict) else None
    if not isinstance(counts, torch.Tensor) or not _is_plain(counts):
        raise UserError(f'{name} has no real tensor "{KEY}" of shape [..., layers, experts].')
    totals = counts.detach().double().reshape(-1, *counts.shape[-2:]).sum(0).numpy()
    moe_layers, experts = list(model.moe_layers), model.n_routed_experts
    if totals.shape == (model.num_hidden_layers, experts):
        totals = totals[moe_layers]
    if totals.shape != (len(moe_layers), experts):
        raise UserError(
            f"{name} counts {totals.shape[0]} layers of {totals.shape[1]} experts; this model has "
            f"{model.num_hidden_layers} layers ({len(moe_layers)} MoE) of {experts}."
        )
    if not np.isfinite(totals).all() or (totals < 0).any():
        raise UserError(f"{name} holds negative or non-finite counts.")
    return totals


def save_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a .safetensors file, or a .pt of any other name, whole or not at all. Raises OSError."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    part = path.with_name(f"{path.name}.part")
    try:
        if path.suffix == ".safetensors":
            save_file(tensors, part)
        else:
            torch.save(tensors, part)
        os.replace(part, path)
    except (SafetensorError, RuntimeError) as error:  # how both say that a file cannot be written
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error
    finally:
        part.unlink(missing_ok=True)


def _is_plain(counts: torch.Tensor) -> bool:
    here = counts.layout == torch.strided and counts.device.type == "cpu"
    return here and counts.dim() >= 2 and not counts.is_complex() and not counts.is_quantized


def _read(path: Path, name: str) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.exists() and not zipfile.is_zipfile(path):  # torch.load raises anything on other bytes
            raise UserError(f"{name} is no file that torch.save or safetensors wrote.")
        return torch.load(path, weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{name} cannot be read: {str(error).splitlines()[0]}.") from error
