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

from hetero_glm5.model.indexer import Indexer
from hetero_glm5.model.state import Cache, Selection, Step, Weights
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops


class Attention:
    def __init__(self, config: ModelConfig, weights: Weights, layer: int, prefix: str):
        c = self.config = config
        self.layer = layer
        self.indexer = Indexer(c, weights, f"{prefix}indexer.") if c.has_indexer(layer) else None
        names, self.sizes = ["kv_a_proj_with_mqa", "q_a_proj"], [c.latent_dim, 0, c.q_lora_rank, 0]
        if self.indexer is not None:
            names = ["kv_a_proj_with_mqa", "indexer.wk", "q_a_proj", "indexer.weights_proj"]
            self.sizes = [c.latent_dim, c.index_head_dim, c.q_lora_rank, c.index_n_heads]
        # All that x is multiplied by as one matrix [sum of sizes, hidden]; what becomes keys comes first.
        self.down = torch.cat([weights(f"{prefix}{name}.weight") for name in names])
        self.q_norm = ops.RMSNorm(weights(f"{prefix}q_a_layernorm.weight"), c.latent_norm_eps)
        self.q_b = weights(f"{prefix}q_b_proj.weight")  # [H·(nope + rope), q_lora]
        self.kv_norm = ops.RMSNorm(weights(f"{prefix}kv_a_layernorm.weight"), c.latent_norm_eps)
        kv_b = weights(f"{prefix}kv_b_proj.weight").view(c.num_attention_heads, -1, c.kv_lora_rank)
        w_uk, w_uv = kv_b.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        self.w_uk, self.w_uv = w_uk.contiguous(), w_uv.contiguous()  # [H, nope, c] [H, v, c]; bmm is slow on views
        self.o = weights(f"{prefix}o_proj.weight")  # [hidden, H·v]

    def __call__(self, x: Tensor, step: Step, cache: Cache, selection: Selection) -> tuple[Tensor, Selection]:
        """x [T, hidden], normed. Returns the attention output [T, hidden] and the selection this layer used: its own
        if it has an indexer, else the one passed in."""
        c = self.config
        kv, index_key, q_latent, head_weights = F.linear(x, self.down).split(self.sizes, -1)
        self._write(kv, index_key, step, cache)

        q_latent = self.q_norm(q_latent)  # [T, q_lora]
        q = F.linear(q_latent, self.q_b).view(len(x), c.num_attention_heads, c.qk_head_dim)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)  # [T, H, nope] [T, H, rope]
        if self.indexer is not None and step.long:
            with step.rows.clock("indexer"):
                selection = self.indexer.select(q_latent, head_weights, step, cache.index[self.layer])

        absorbed = torch.bmm(q_nope.transpose(0, 1), self.w_uk).transpose(0, 1)  # [T, H, c]
        mixed = self._attend(torch.cat((absorbed, ops.rope(q_rope, step.rotation)), -1), step, cache, selection)
        out = torch.bmm(mixed.transpose(0, 1), self.w_uv.transpose(1, 2)).transpose(0, 1)  # [T, H, v]
        return F.linear(out.flatten(1), self.o), selection

    def remember(self, x: Tensor, step: Step, cache: Cache) -> None:
        """Only caches the rows' keys. x [T, hidden], normed."""
        sizes = self.sizes[:2]
        self._write(*F.linear(x, self.down[: sum(sizes)]).split(sizes, -1), step, cache)

    def _write(self, kv: Tensor, index_key: Tensor, step: Step, cache: Cache) -> None:
        """kv [T, c + r] and index_key [T, index_head_dim], as projected."""
        c = self.config
        latent, k_rope = kv.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)  # [T, c] [T, rope]
        keys = torch.cat((self.kv_norm(latent), ops.rope(k_rope, step.rotation)), -1)
        cache.latent[self.layer].write(step.rows.slots, keys)
        if self.indexer is not None:
            with step.rows.clock("indexer"):
                cache.index[self.layer].write(step.rows.slots, self.indexer.key(index_key, step.rotation))

    def _attend(self, q: Tensor, step: Step, cache: Cache, selection: Selection) -> Tensor:
        """q [T, H, c + r] → Σ p·latent [T, H, c]."""
        c, keys = self.config, cache.latent[self.layer]
        if step.host is not None:
            return step.host.attend(q, keys, c.softmax_scale, c.kv_lora_rank).to(q.dtype)
        mixed = q.new_empty(*q.shape[:2], c.kv_lora_rank)
        for group, slots in zip(step.groups, selection, strict=True):
            if slots is None:
                part = ops.attend_dense(group(q), keys.read, group.seen, c.softmax_scale, c.kv_lora_rank).flatten(0, 1)
            else:
                of_rows = q[group.rows], keys.read, slots.flatten(0, 1)
                part = ops.attend_selected(*of_rows, c.softmax_scale, c.kv_lora_rank)
            mixed[group.rows] = part
        return mixed
