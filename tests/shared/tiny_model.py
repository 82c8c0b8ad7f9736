"""The model of a checkpoint with experts in plain torch, and rows to run it on: for tests that need no engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from oracle import LATENT_EPS
from torch import Tensor

from hetero_glm5.experts.cpu_tier import HostPool
from hetero_glm5.model.few_rows import FewRows
from hetero_glm5.model.glm5 import GLM5
from hetero_glm5.model.mtp import MTP
from hetero_glm5.model.state import Rows, Segment
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops
from hetero_glm5.weights.checkpoint import Checkpoint
from hetero_glm5.weights.expert_source import read_expert
from hetero_glm5.weights.load import ModelWeights


def load_model(folder: Path, pool: HostPool | None = None, dtype: torch.dtype = torch.float32):
    """(model, its MTP layer, experts); with a pool, few rows are computed by it."""
    config = dataclasses.replace(ModelConfig.load(folder), latent_norm_eps=LATENT_EPS)
    weights = ModelWeights(config, str(folder), mtp=True).getter(dtype, "cpu")
    checkpoint = Checkpoint(folder)
    few = None if pool is None else FewRows(config, pool.handle)

    def experts(layer, x, ids, weights, clock):
        y = ops.experts(x, ids, weights, lambda e: [m.to(x.dtype) for m in read_expert(checkpoint, layer, e)[:3]])
        return lambda: y

    model = GLM5(config, weights, few)
    return model, MTP(model, weights), experts


def rows_of(ids: Tensor, *spans: tuple[int, int, int]) -> Rows:
    """ids [S]: what every sequence holds. A span (first, last, slot) is a segment: positions first:last of a sequence
    whose cache slots begin at `slot`."""
    at = [torch.arange(first, last) for first, last, _ in spans]
    starts = [sum(map(len, at[:i])) for i in range(len(at))]
    segments = [
        Segment(start, start + len(places), slot + torch.arange(last))
        for start, places, (_, last, slot) in zip(starts, at, spans, strict=True)
    ]
    slots = torch.cat([slot + places for places, (_, _, slot) in zip(at, spans, strict=True)])
    return Rows(ids[torch.cat(at)], torch.cat(at), slots, segments)
