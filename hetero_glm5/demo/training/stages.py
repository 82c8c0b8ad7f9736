"""What each stage trains, and its loss.

    dense    the model with attention to all earlier tokens; no indexer
    indexer  the indexers alone: KL from the attention of the dense model to the softmax of their scores
    sparse   the model with index_topk in force, and the indexers by KL over what they select
    mtp      the MTP layer alone, the model frozen
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hetero_glm5.demo.training.data import Batch
from hetero_glm5.demo.training.forward import Forward
from hetero_glm5.demo.training.kernels import CrossEntropy
from hetero_glm5.demo.training.model import Demo
from hetero_glm5.demo.training.optimizer import Rates


class Watch:
    """Sees what happens inside layers: here, how many tokens each expert gets."""

    def __init__(self, gates: list[nn.Module], experts: int):
        self.place = {id(gate): i for i, gate in enumerate(gates)}
        self.counts = torch.zeros(len(gates), experts)

    def attention(self, module: Any, hidden: Tensor, query_latent: Tensor) -> Any:
        return None

    def load(self, gate: nn.Module, counts: Tensor) -> None:
        if id(gate) in self.place:
            self.counts[self.place[id(gate)]] += counts


class Dense:
    name, before = "dense", None
    rates = Rates(matrix=0.01, table=0.004)
    shortest = 0

    def __init__(self, demo: Demo, *, compiled: bool = True, dtype: torch.dtype = torch.bfloat16):
        self.demo, self.forward = demo, Forward(demo.trunk.config, compiled=compiled, dtype=dtype)

    @staticmethod
    def parameters(demo: Demo) -> dict[str, nn.Parameter]:
        return {name: p for name, p in demo.trunk.named_parameters() if "indexer" not in name}

    @staticmethod
    def gates(demo: Demo) -> list[nn.Module]:
        return [layer.mlp.gate for layer in demo.trunk.model.layers if hasattr(layer.mlp, "gate")]

    def loss(self, batch: Batch, watch: Watch | None) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and each scored row's cross entropy."""
        trunk = self.demo.trunk
        hidden = self.forward.trunk(trunk.model, batch.tokens, batch.positions, batch.spans, watch)
        return CrossEntropy.apply(
            hidden.index_select(0, batch.rows),
            trunk.lm_head.weight,
            batch.targets,
            batch.weights / len(batch.tokens),
            self.forward.kernels,
        )


STAGES = {stage.name: stage for stage in (Dense,)}
