"""The DSA lightning indexer: which ≤ index_topk earlier positions a row attends to, one set for all heads.

iq = wq_b·ql (ql: the normed q latent), ik = LayerNorm(wk·x), both rotated on their first qk_rope_head_dim dimensions;
I[t,s] = Σ_h w[t,h] · relu(iq[t,h]·ik[s]). Constants that only scale I do not change the choice, and are applied all the
same. A sequence no longer than index_topk is attended to whole: nothing is scored, but its keys are cached.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_glm5.model.state import Rows, Weights
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops

K_NORM_EPS = 1e-6

Selection = list[Tensor | None]  # for each segment: positions [rows, index_topk], or None for "all of them"


class Indexer:
    def __init__(self, config: ModelConfig, weights: Weights, prefix: str):
        self.config = config
        self.wq_b = weights(f"{prefix}wq_b.weight")  # [heads·dim, q_lora]
        self.wk = weights(f"{prefix}wk.weight")  # [dim, hidden]
        self.k_norm = weights(f"{prefix}k_norm.weight"), weights(f"{prefix}k_norm.bias")
        self.weights_proj = weights(f"{prefix}weights_proj.weight")  # [heads, hidden]

    def select(self, x: Tensor, q_latent: Tensor, rows: Rows, rotation: tuple[Tensor, Tensor], pool: Tensor):
        """Caches the rows' keys in `pool` and returns the Selection. x [T, hidden], q_latent [T, q_lora]."""
        c = self.config
        keys = ops.layer_norm(F.linear(x, self.wk), *self.k_norm, K_NORM_EPS)  # [T, dim]
        pool[rows.slots] = self._rotate(keys, rotation).to(pool.dtype)

        selection: Selection = [None] * len(rows.segments)
        long = [i for i, segment in enumerate(rows.segments) if len(segment.context) > c.index_topk]
        if long:
            q = F.linear(q_latent, self.wq_b).view(-1, c.index_n_heads, c.index_head_dim)
            q = self._rotate(q, rotation) * c.index_head_dim**-0.5
            head_weights = F.linear(x, self.weights_proj) * c.index_n_heads**-0.5  # [T, heads]
            for i in long:
                segment = rows.segments[i]
                r = segment.rows
                selection[i] = ops.select_positions(q[r], head_weights[r], pool[segment.context], c.index_topk)
        return selection

    def _rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        turned, rest = x.split([self.config.qk_rope_head_dim, x.shape[-1] - self.config.qk_rope_head_dim], -1)
        return torch.cat((ops.rope(turned, *rotation), rest), -1)
