"""Training of the DSA indexers (DeepSeek-V3.2, section 2.1): KL from what the heads attend to, summed over heads and
normalised, to the softmax of the index scores. Nothing of it reaches the rest of the model: inputs are detached.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_glm5.demo.training.forward import linear, rotate

K_NORM_EPS = 1e-6


class Indexing:
    """What Attend asks and tells about one layer: attention is restricted to the index_topk best scores if `select`;
    KL is measured if `scale` is given, and gradients of scale · KL are gathered if it is not 0. Only queries that come
    late enough to need a selection, or half as late, count for KL."""

    def __init__(self, indexer: Any, inputs: tuple[Tensor, Tensor], rotation: tuple[Tensor, Tensor]):
        self.indexer, self.select = indexer, False
        self.scale: float | None = None
        self.divergence, self.rows = 0.0, 0
        self.scored: Tensor | None = None
        with torch.enable_grad():
            self.made = self._project(*(t.detach() for t in inputs), *rotation)
        self.leaves = [t.detach().requires_grad_() for t in self.made]

    def _project(self, hidden: Tensor, latent: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, heads, dim] and k [T, dim], rotated in their first dimensions; weights [T, heads], with all scales."""
        own, dtype = self.indexer, hidden.dtype
        width, turned = own.head_dim, own.qk_rope_head_dim
        q = linear(latent, own.wq_b.weight, dtype).view(-1, own.n_heads, width)
        k = linear(hidden, own.wk.weight, dtype).float()
        k = F.layer_norm(k, (width,), own.k_norm.weight, own.k_norm.bias, K_NORM_EPS)
        q = torch.cat((rotate(q[..., :turned], cos[:, None], sin[:, None]), q[..., turned:].float()), -1)
        k = torch.cat((rotate(k[:, :turned], cos, sin), k[:, turned:]), -1)
        w = linear(hidden, own.weights_proj.weight, dtype).float() * (own.n_heads * width) ** -0.5
        return q.to(dtype), k.to(dtype), w

    def scores(self, start: int, a: int, b: int) -> Tensor:
        """I [b-a, b-start], -inf for later tokens."""
        q, k, w = self.leaves
        products = F.relu(q[a:b].flatten(0, 1) @ k[start:b].T).view(b - a, -1, b - start)
        scores = (w[a:b, None].to(products.dtype) @ products).squeeze(1).float()
        later = torch.ones(b - a, b - start, dtype=torch.bool).triu_(a - start + 1)
        return scores.masked_fill(later, -torch.inf)

    def allowed(self, start: int, a: int, b: int) -> Tensor | None:
        top = self.indexer.index_topk
        learn, select = self.scale is not None and b - start > top // 2, self.select and b - start > top
        self.scored = mask = None
        if learn or select:
            with torch.set_grad_enabled(bool(learn and self.scale)):
                scored = self.scores(start, a, b)
                if select:
                    best = scored.detach().topk(top, -1).indices  # an early query's hold later tokens, which stay -inf
                    mask = torch.zeros_like(scored, dtype=torch.bool).scatter_(1, best, True)
                    scored = scored.masked_fill(~mask, -torch.inf)
            self.scored = scored if learn else None
        return mask

    def seen(self, p: Tensor) -> None:
        """Takes the attention [H, b-a, b-start] of the queries that `allowed` was asked about last."""
        if self.scored is None:
            return
        target = p.float().mean(0)
        with torch.set_grad_enabled(bool(self.scale)):
            logq = torch.log_softmax(self.scored, -1).masked_fill(target == 0, 0.0)
            loss = (target * (target.clamp_min(1e-20).log() - logq)).sum()
            if self.scale:
                (loss * self.scale).backward()
        self.divergence += loss.item()
        self.rows += len(target)

    def finish(self) -> None:
        """After the layer's attention: from the gradients of queries, keys and weights to the indexer's."""
        if self.rows and self.scale:
            torch.autograd.backward(self.made, [leaf.grad for leaf in self.leaves])
