"""The multi-token-prediction layer (number num_hidden_layers): drafts the token after next.

z_i = eh_proj·[RMS_enorm(embedding(t_{i+1})) ; RMS_hnorm(h_i)], h_i the model's hidden state after its final norm;
m_i = RMS_shared_head(Layer(z_i)) at position i, over the layer's own KV cache and its own indexer; lm_head·m_i predicts
t_{i+2}. A further draft step feeds m_i back as h. Embedding and lm_head are the model's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_glm5.model.glm5 import GLM5
from hetero_glm5.model.layers import Layer
from hetero_glm5.model.moe import Experts
from hetero_glm5.model.state import Cache, Rows, Step, Weights
from hetero_glm5.ops import reference as ops
from hetero_glm5.weights.names import layer_prefix


class MTP:
    def __init__(self, model: GLM5, weights: Weights):
        self.model, self.config = model, model.config
        layer = self.config.num_hidden_layers
        prefix = layer_prefix(layer)
        eps = self.config.rms_norm_eps
        self.enorm = ops.RMSNorm(weights(f"{prefix}enorm.weight"), eps)
        self.hnorm = ops.RMSNorm(weights(f"{prefix}hnorm.weight"), eps)
        self.eh_proj = weights(f"{prefix}eh_proj.weight")  # [hidden, 2·hidden]
        self.layer = Layer(self.config, weights, layer)
        self.norm = ops.RMSNorm(weights(f"{prefix}shared_head.norm.weight"), eps)
        self.few = model.few
        if self.few is not None:
            self._few_layer, self._few_norm = self.few.layer(self.layer), self.few.norm(self.norm)
            self._few_norms = self.few.norm(self.enorm), self.few.norm(self.hnorm)
            self._few_proj = self.few.product(self.eh_proj)

    def forward(
        self, hidden: Tensor, rows: Rows, cache: Cache, experts: Experts, before: tuple[Tensor, Rows] | None = None
    ) -> Tensor:
        """m [T, hidden] from the model's hidden states [T, hidden] at the rows' positions; rows.token_ids are the
        *next* tokens t_{i+1}. Draft logits: model.logits(m). `before`: what remember is to be called with first."""
        if before is not None and self.few and self.few.takes(len(hidden) + len(before[0])):
            hidden, rows = torch.cat((hidden, before[0])), rows.followed_by(before[1])
        elif before is not None:
            self.remember(*before, cache)
        host = self.few and self.few.step(rows, cache)
        if host and host.few:
            stream = self._few_z(hidden, rows)
            self._few_layer(stream, host, experts)
            return self._few_norm(stream[: rows.attending]).to(hidden.dtype)
        step = Step.of(rows, self.config, host)
        y, _ = self.layer(self._z(hidden, rows), step, cache, experts, [None] * len(step.groups))
        return self.norm(y)

    def remember(self, hidden: Tensor, rows: Rows, cache: Cache) -> None:
        """Only caches the keys of rows of no segment, that draft nothing: no attention, no experts. Arguments as for
        forward."""
        host = self.few and self.few.step(rows, cache)
        if host and host.few:
            self._few_layer.attend(self._few_z(hidden, rows), host)
        else:
            self.layer.remember(self._z(hidden, rows), Step.of(rows, self.config), cache)

    def _z(self, hidden: Tensor, rows: Rows) -> Tensor:
        embedded = F.embedding(rows.token_ids, self.model.embedding)
        return F.linear(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1), self.eh_proj)

    def _few_z(self, hidden: Tensor, rows: Rows) -> Tensor:
        """The same in fp32."""
        of_token, of_state = self._few_norms
        embedded = F.embedding(rows.token_ids, self.model.embedding)
        return self._few_proj(torch.cat((of_token(embedded), of_state(hidden)), -1))
