"""Absorbed multi-head latent attention over the paged latent cache, on the positions the indexer chose.

kv_b holds W_UK [H, nope, c] and W_UV [H, v, c]. Since k = W_UK·latent and v = W_UV·latent,
    q_nope·k = (q_nope·W_UK)·latent        and        Σ p·v = W_UV·(Σ p·latent),
so only the latent (c) and one shared rotated key (r) are cached for a token, and all heads read the same cached row.
The softmax scale is that of the expanded form, (nope + rope)^-½.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_glm5.model.indexer import Indexer, Selection
from hetero_glm5.model.state import Cache, Rows, Weights
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops


class Attention:
    def __init__(self, config: ModelConfig, weights: Weights, layer: int, prefix: str):
        c = self.config = config
        self.layer = layer
        self.q_a = weights(f"{prefix}q_a_proj.weight")  # [q_lora, hidden]
        self.q_norm = weights(f"{prefix}q_a_layernorm.weight")
        self.q_b = weights(f"{prefix}q_b_proj.weight")  # [H·(nope + rope), q_lora]
        self.kv_a = weights(f"{prefix}kv_a_proj_with_mqa.weight")  # [c + rope, hidden]
        self.kv_norm = weights(f"{prefix}kv_a_layernorm.weight")
        kv_b = weights(f"{prefix}kv_b_proj.weight").view(c.num_attention_heads, -1, c.kv_lora_rank)
        w_uk, w_uv = kv_b.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        self.w_uk, self.w_uv = w_uk.contiguous(), w_uv.contiguous()  # [H, nope, c] [H, v, c]; bmm is slow on views
        self.o = weights(f"{prefix}o_proj.weight")  # [hidden, H·v]
        self.indexer = Indexer(c, weights, f"{prefix}indexer.") if c.has_indexer(layer) else None

    def __call__(
        self, x: Tensor, rows: Rows, cache: Cache, rotation: tuple[Tensor, Tensor], selection: Selection | None
    ) -> tuple[Tensor, Selection]:
        """x [T, hidden], normed. Returns the attention output [T, hidden] and the selection this layer used: its own
        if it has an indexer, else the one passed in."""
        c, pool = self.config, cache.latent[self.layer]
        q_latent = ops.rms_norm(F.linear(x, self.q_a), self.q_norm, c.latent_norm_eps)  # [T, q_lora]
        q = F.linear(q_latent, self.q_b).view(len(x), c.num_attention_heads, c.qk_head_dim)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)  # [T, H, nope] [T, H, rope]

        latent, k_rope = F.linear(x, self.kv_a).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)  # [T, c] [T, rope]
        latent = ops.rms_norm(latent, self.kv_norm, c.latent_norm_eps)
        pool[rows.slots] = torch.cat((latent, ops.rope(k_rope, *rotation)), -1).to(pool.dtype)

        if self.indexer is not None:
            with rows.clock("indexer"):
                selection = self.indexer.select(x, q_latent, rows, rotation, cache.index[self.layer])

        absorbed = torch.bmm(q_nope.transpose(0, 1), self.w_uk).transpose(0, 1)  # [T, H, c]
        mixed = self._attend(torch.cat((absorbed, ops.rope(q_rope, *rotation)), -1), rows, pool, selection)
        out = torch.bmm(mixed.transpose(0, 1), self.w_uv.transpose(1, 2)).transpose(0, 1)  # [T, H, v]
        return F.linear(out.flatten(1), self.o), selection

    def _attend(self, q: Tensor, rows: Rows, pool: Tensor, selection: Selection) -> Tensor:
        """q [T, H, c + r] → Σ p·latent [T, H, c], one sequence at a time."""
        c = self.config
        mixed = q.new_empty(*q.shape[:2], c.kv_lora_rank)
        for segment, chosen in zip(rows.segments, selection, strict=True):
            r = segment.rows
            if chosen is None:
                context = pool[segment.context]
                mixed[r] = ops.attend_dense(q[r], context, c.softmax_scale, c.kv_lora_rank)
            else:
                slots = torch.where(chosen < 0, -1, segment.context[chosen.clamp(min=0)])
                mixed[r] = ops.attend_selected(q[r], pool, slots, c.softmax_scale, c.kv_lora_rank)
        return mixed
