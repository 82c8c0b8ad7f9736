"""The DSA lightning indexer: which ≤ index_topk earlier positions a row attends to, one set for all heads.

iq = wq_b·ql (ql: the normed q latent), ik = LayerNorm(wk·x), both rotated on their first qk_rope_head_dim dimensions;
I[t,s] = Σ_h w[t,h] · relu(iq[t,h]·ik[s]). Constants that only scale I do not change the choice, and are applied all the
same. A sequence no longer than index_topk is attended to whole: nothing is scored, but its keys are cached.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_glm5.model.key_store import KeyStore
from hetero_glm5.model.state import Selection, Step, Weights
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops

K_NORM_EPS = 1e-6


class Indexer:
    """wk and weights_proj, which x is multiplied by, are part of the attention's matrix."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str):
        self.config = config
        self.wq_b = weights(f"{prefix}wq_b.weight")  # [heads·dim, q_lora]
        self.k_norm = weights(f"{prefix}k_norm.weight"), weights(f"{prefix}k_norm.bias")

    def key(self, projected: Tensor, rotation: Tensor) -> Tensor:
        """wk·x [T, dim] → what is cached, [T, dim]."""
        return self._rotate(ops.layer_norm(projected, *self.k_norm, K_NORM_EPS), rotation)

    def select(self, q_latent: Tensor, head_weights: Tensor, step: Step, keys: KeyStore) -> Selection:
        """q_latent [T, q_lora]; head_weights [T, heads] = weights_proj·x; the rows' keys are in the store. What a host
        step chooses stays there."""
        c = self.config
        q = F.linear(q_latent, self.wq_b).view(-1, c.index_n_heads, c.index_head_dim)
        q = self._rotate(q, step.rotation) * c.index_head_dim**-0.5
        head_weights = head_weights * c.index_n_heads**-0.5
        if step.host is not None:
            step.host.choose(q, head_weights, keys)
            return []
        return [
            ops.select_slots(group(q), group(head_weights), keys.read, group.seen, c.index_topk) if group.long else None
            for group in step.groups
        ]

    def _rotate(self, x: Tensor, rotation: Tensor) -> Tensor:
        turned, rest = x.split([self.config.qk_rope_head_dim, x.shape[-1] - self.config.qk_rope_head_dim], -1)
        return torch.cat((ops.rope(turned, rotation), rest), -1)
