"""GLM-5: embedding, layers, final norm, lm_head. The forward pass is one loop."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hetero_glm5.model.few_rows import FewRows
from hetero_glm5.model.host_step import most_few_rows
from hetero_glm5.model.layers import Layer
from hetero_glm5.model.moe import Experts
from hetero_glm5.model.state import Cache, Rows, Selection, Step, Weights
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops


class GLM5:
    """few: computes steps of few rows on CPU cores; None: they are computed like any other."""

    def __init__(self, config: ModelConfig, weights: Weights, few: FewRows | None = None):
        self.config, self.few = config, few
        self.embedding = weights("model.embed_tokens.weight")  # [vocab, hidden]
        self.layers = [Layer(config, weights, i) for i in range(config.num_hidden_layers)]
        self.norm = ops.RMSNorm(weights("model.norm.weight"), config.rms_norm_eps)
        self.lm_head = weights("lm_head.weight")  # [vocab, hidden]
        if few is not None:
            self._few_layers = [few.layer(layer) for layer in self.layers]
            self._few_norm, self._few_logits = few.norm(self.norm), few.product(self.lm_head)

    def forward(self, rows: Rows, cache: Cache, experts: Experts) -> Tensor:
        """Hidden states after the final norm, [T, hidden]; writes the rows' keys to the cache."""
        x = F.embedding(rows.token_ids, self.embedding)
        host = self.few and self.few.step(rows, cache)
        if host and host.few:
            stream = x.float()
            for few_layer in self._few_layers:
                few_layer(stream, host, experts)
            return self._few_norm(stream).to(x.dtype)
        step = Step.of(rows, self.config, host)
        selection: Selection = [None] * len(step.groups)
        for layer in self.layers:
            x, selection = layer(x, step, cache, experts, selection)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [T, vocab]."""
        if self.few is not None and len(hidden) <= most_few_rows(self.config):
            return self._few_logits(hidden)
        return F.linear(hidden, self.lm_head).float()
