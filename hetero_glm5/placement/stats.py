"""Routing counts: how often each expert of each layer was chosen."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hetero_glm5.core import UserError

KEY = "logical_count"


def load_counts(path: str, moe_layers: tuple[int, ...], num_layers: int, experts: int) -> np.ndarray:
    """float64 [len(moe_layers), experts] from a .safetensors or .pt file with `logical_count` [..., layers, experts]
    (SGLang's expert-distribution recorder writes one for all layers, dense ones zero; only MoE layers is fine too).
    Raises UserError."""
    data = _read(path)
    counts = data.get(KEY) if isinstance(data, dict) else None
    if not isinstance(counts, torch.Tensor) or not _is_plain(counts):
        raise UserError(f'--init-expert-location {path} has no real tensor "{KEY}" of shape [..., layers, experts].')
    totals = counts.detach().double().reshape(-1, *counts.shape[-2:]).sum(0).numpy()
    if totals.shape == (num_layers, experts):
        totals = totals[list(moe_layers)]
    if totals.shape != (len(moe_layers), experts):
        raise UserError(
            f"--init-expert-location {path} counts {totals.shape[0]} layers of {totals.shape[1]} experts; this model "
            f"has {num_layers} layers ({len(moe_layers)} MoE) of {experts}."
        )
    if not np.isfinite(totals).all() or (totals < 0).any():
        raise UserError(f"--init-expert-location {path} holds negative or non-finite counts.")
    return totals


def _is_plain(counts: torch.Tensor) -> bool:
    here = counts.layout == torch.strided and counts.device.type == "cpu"
    return here and counts.dim() >= 2 and not counts.is_complex() and not counts.is_quantized


def _read(path: str) -> Any:
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        if Path(path).exists() and not zipfile.is_zipfile(path):  # torch.load raises anything on other bytes
            raise UserError(f"--init-expert-location {path} is no file that torch.save or safetensors wrote.")
        return torch.load(path, weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"--init-expert-location {path} cannot be read: {str(error).splitlines()[0]}.") from error
