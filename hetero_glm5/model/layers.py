"""One transformer layer: x += Attention(RMS(x)); x += FFN(RMS(x))."""

from __future__ import annotations

from torch import Tensor

from hetero_glm5.model.attention import Attention
from hetero_glm5.model.moe import DenseMLP, Experts, MoE
from hetero_glm5.model.state import Cache, Selection, Step, Weights
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops
from hetero_glm5.weights.names import layer_prefix


class Layer:
    def __init__(self, config: ModelConfig, weights: Weights, layer: int):
        prefix = layer_prefix(layer)
        self.input_norm = ops.RMSNorm(weights(f"{prefix}input_layernorm.weight"), config.rms_norm_eps)
        self.attention = Attention(config, weights, layer, f"{prefix}self_attn.")
        self.post_norm = ops.RMSNorm(weights(f"{prefix}post_attention_layernorm.weight"), config.rms_norm_eps)
        if config.is_sparse(layer):
            self.mlp = MoE(config, weights, layer, f"{prefix}mlp.")
        else:
            self.mlp = DenseMLP(weights, f"{prefix}mlp.")

    def __call__(
        self, x: Tensor, step: Step, cache: Cache, experts: Experts, selection: Selection
    ) -> tuple[Tensor, Selection]:
        """x [T, hidden]; selection: the latest full layer's."""
        with step.rows.clock("attention"):
            attended, selection = self.attention(self.input_norm(x), step, cache, selection)
        x = x + attended
        return x + self.mlp(self.post_norm(x), step.rows, experts), selection

    def remember(self, x: Tensor, step: Step, cache: Cache) -> None:
        """Only caches the rows' keys, from which nothing else of the layer follows. x [T, hidden]."""
        with step.rows.clock("attention"):
            self.attention.remember(self.input_norm(x), step, cache)
