"""Feed-forward parts: the dense MLP of the first layers, and the MoE: router, shared expert, routed experts.

y = Σ_k w_k·E_k(x) + Shared(x). The routed part is a callable handed in by the engine: `experts(layer, x, ids, weights,
clock)` starts them and returns a function that waits and gives the sum, so that the shared expert runs meanwhile.
This module knows no device and no tier.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_glm5.core import UserError
from hetero_glm5.model.state import Clocked, Rows, Weights
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops
from hetero_glm5.weights.names import EXPERT_MATRICES

Join = Callable[[], Tensor]  # → fp32 [T, hidden]
Experts = Callable[[int, Tensor, Tensor, Tensor, Clocked], Join]


class DenseMLP:
    part = "dense_mlp"

    def __init__(self, weights: Weights, prefix: str):
        gate, up, self.down = (weights(f"{prefix}{name}.weight") for name in EXPERT_MATRICES)
        self.gate_up = torch.cat((gate, up))  # [2·intermediate, hidden]

    def __call__(self, x: Tensor, rows: Rows, experts: Experts) -> Tensor:
        with rows.clock(self.part):
            gate, up = F.linear(x, self.gate_up).chunk(2, -1)
            return F.linear(F.silu(gate).mul_(up), self.down)


class SharedExpert(DenseMLP):
    part = "shared_expert"


class MoE:
    def __init__(self, config: ModelConfig, weights: Weights, layer: int, prefix: str):
        self.config, self.layer = config, layer
        self.gate = weights(f"{prefix}gate.weight")  # [E, hidden], fp32
        self.bias = weights(f"{prefix}gate.e_score_correction_bias")  # [E], fp32
        if not self.bias.isfinite().all():
            raise UserError(f"{prefix}gate.e_score_correction_bias is not finite; routing needs it. Fetch it again.")
        self.shared = SharedExpert(weights, f"{prefix}shared_experts.")

    def __call__(self, x: Tensor, rows: Rows, experts: Experts) -> Tensor:
        c = self.config
        with rows.clock("router"):
            ids, weights = ops.route(
                F.linear(x.float(), self.gate),
                self.bias,
                topk=c.num_experts_per_tok,
                groups=(c.n_group, c.topk_group),
                scale=c.routed_scaling_factor,
                normalise=c.norm_topk_prob,
            )
        routed = experts(self.layer, x, ids, weights, rows.clock)
        shared = self.shared(x, rows, experts)
        return (routed() + shared).to(x.dtype)
