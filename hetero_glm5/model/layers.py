"""One transformer layer: x += Attention(RMS(x)); x += FFN(RMS(x))."""

from __future__ import annotations

from torch import Tensor

from hetero_glm5.model.attention import Attention
from hetero_glm5.model.indexer import Selection
from hetero_glm5.model.moe import DenseMLP, Experts, MoE
from hetero_glm5.model.state import Cache, Rows, Weights
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops
from hetero_glm5.weights.names import layer_prefix


class Layer:
    def __init__(self, config: ModelConfig, weights: Weights, layer: int):
        prefix = layer_prefix(layer)
        self.eps = config.rms_norm_eps
        self.input_norm = weights(f"{prefix}input_layernorm.weight")
        self.attention = Attention(config, weights, layer, f"{prefix}self_attn.")
        self.post_norm = weights(f"{prefix}post_attention_layernorm.weight")
        if config.is_sparse(layer):
            self.mlp = MoE(config, weights, layer, f"{prefix}mlp.")
        else:
            self.mlp = DenseMLP(weights, f"{prefix}mlp.")

    def __call__(
        self,
        x: Tensor,
        rows: Rows,
        cache: Cache,
        experts: Experts,
        carried: tuple[tuple[Tensor, Tensor], Selection | None],
    ) -> tuple[Tensor, Selection]:
        """x [T, hidden]; `carried` is what layers share: the rotation table and the latest full layer's selection."""
        with rows.clock("attention"):
            attended, selection = self.attention(ops.rms_norm(x, self.input_norm, self.eps), rows, cache, *carried)
        x = x + attended
        return x + self.mlp(ops.rms_norm(x, self.post_norm, self.eps), rows, experts), selection
