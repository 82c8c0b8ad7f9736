"""Runs the model on a batch: rows in, logits of the rows that draw a token out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hetero_glm5.core import Batch, Chunk
from hetero_glm5.engine.batch import BatchTensors
from hetero_glm5.engine.sampler import prompt_logprobs
from hetero_glm5.engine.speculative import Computed
from hetero_glm5.model.glm5 import GLM5
from hetero_glm5.model.moe import Experts
from hetero_glm5.model.state import Cache, Clocked

FEW_ROWS = 256  # whose logits over the whole vocabulary are held at once


class Runner:
    """`computed` is what the latest step computed."""

    def __init__(self, model: GLM5, experts: Experts, cache: Cache, tensors: BatchTensors):
        self.model, self.experts, self.cache, self.tensors = model, experts, cache, tensors
        self.device = str(model.lm_head.device)
        self.computed: Computed | None = None

    def wait(self) -> None:
        """Until the device has done what it was asked to."""
        if self.device.startswith("cuda"):
            torch.cuda.current_stream().synchronize()

    @torch.inference_mode()
    def forward(self, batch: Batch, clock: Clocked) -> Tensor:
        """fp32 [rows that draw, vocab], in the batch's order; also fills seq.logits and seq.prompt_logprobs where they
        are asked for."""
        self._fill_pages(batch)
        self.computed = None
        if not batch.chunks:
            return self.model.lm_head.new_empty(0, len(self.model.lm_head), dtype=torch.float32)
        rows = self.tensors.rows(batch, clock)
        hidden = self.model.forward(rows, self.cache, self.experts)
        self.computed = Computed.of(batch, rows, hidden)
        with clock("lm_head"):
            draws: list[int] = []
            for chunk, segment in zip(batch.chunks, rows.segments, strict=True):
                if chunk.seq.reads_prompt:
                    self._read(chunk, hidden[segment.rows])
                draws += range(segment.stop - chunk.num_draws, segment.stop)
            return self.model.logits(hidden[draws])

    def _fill_pages(self, batch: Batch) -> None:
        if batch.restored:
            pages, contents = zip(*batch.restored, strict=True)
            self.cache.write_pages(list(pages), torch.from_numpy(np.stack(contents)))
        if batch.copies:
            size = self.tensors.page_size
            self.cache.copy_slots([(c.source * size, c.target * size, c.count) for c in batch.copies])

    @torch.inference_mode()
    def read_pages(self, pages: list[int]) -> Tensor:
        """uint8 [pages, bytes of a page], on the CPU."""
        return self.cache.read_pages(pages, self.tensors.page_size).cpu()

    def _read(self, chunk: Chunk, hidden: Tensor) -> None:
        """What is wanted of every position of a prompt. hidden [rows of the chunk, hidden]."""
        seq = chunk.seq
        if seq.logits is not None:
            seq.logits.append(self.model.logits(hidden).cpu())
        following = seq.tokens[chunk.start + 1 : seq.num_prompt][: len(hidden)]
        known, most = seq.prompt_logprobs, seq.params.prompt_logprobs
        if known is not None and most is not None and following and len(known) == chunk.start:
            targets = torch.tensor(following, device=hidden.device)
            for few, next_few in zip(hidden[: len(targets)].split(FEW_ROWS), targets.split(FEW_ROWS), strict=True):
                logits = self.model.logits(few)
                known += prompt_logprobs(logits, next_few, most)

    @torch.inference_mode()
    def unsound(self, batch: Batch) -> list[int]:
        """The chunks with rows whose hidden states are not finite. Rows that draw are not looked at: the sampler sees
        their logits."""
        if self.computed is None or all(chunk.num_draws == chunk.num_rows for chunk in batch.chunks):
            return []
        finite = self.computed.hidden.isfinite().all(-1).tolist()
        if all(finite):
            return []
        segments = [segment.rows for segment in self.computed.rows.segments]
        return [i for i, rows in enumerate(segments) if not all(finite[rows])]
