"""Runs the model on a batch: rows in, logits of the rows that draw a token out."""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_glm5.core import Batch
from hetero_glm5.engine.batch import to_rows
from hetero_glm5.model.glm5 import GLM5
from hetero_glm5.model.moe import Experts
from hetero_glm5.model.state import Cache, Clocked


class Runner:
    def __init__(self, model: GLM5, experts: Experts, cache: Cache, page_size: int):
        self.model, self.experts, self.cache, self.page_size = model, experts, cache, page_size
        self.device = str(model.lm_head.device)

    def wait(self) -> None:
        """Until the device has done what it was asked to."""
        if self.device.startswith("cuda"):
            torch.cuda.current_stream().synchronize()

    @torch.inference_mode()
    def forward(self, batch: Batch, clock: Clocked) -> Tensor:
        """fp32 [chunks that draw, vocab], in the batch's order; also fills seq.logits where it is asked for."""
        rows = to_rows(batch, self.page_size, self.device, clock)
        hidden = self.model.forward(rows, self.cache, self.experts)
        with clock("lm_head"):
            for chunk, segment in zip(batch.chunks, rows.segments, strict=True):
                if chunk.seq.logits is not None:
                    chunk.seq.logits.append(self.model.logits(hidden[segment.rows]).cpu())
            last = [s.stop - 1 for c, s in zip(batch.chunks, rows.segments, strict=True) if c.samples]
            return self.model.logits(hidden[last])
