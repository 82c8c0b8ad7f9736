"""How often the tokens that the MTP layer drafts are what the model itself goes on to say.

Greedy text of the model is taken as given. At each place of it (the newest token known, the next not computed) the MTP
layer drafts up to `depth` tokens: the first from the model's true hidden state, each further one from the MTP layer's
own output and the token drafted before, over a cache that holds true entries up to that place and drafted ones beyond.
A draft counts as accepted if it and all before it are the tokens that follow. This is what a speculative step would
accept there, since the text is greedy; nothing of the engine takes part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hetero_glm5 import hardware
from hetero_glm5.core import UserError
from hetero_glm5.experts.cpu_tier import HostPool
from hetero_glm5.experts.load import load_tiers
from hetero_glm5.model.glm5 import GLM5
from hetero_glm5.model.mtp import MTP
from hetero_glm5.model.state import Cache, Rows, Segment
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.load import ModelWeights

DEPTH = 3


class Drafter:
    """A checkpoint's model and MTP layer, with all experts on the host; a context manager. Raises UserError."""

    def __init__(self, folder: str, *, dtype: torch.dtype = torch.bfloat16, method: str = "BF16"):
        self.config = ModelConfig.load(folder)
        if not self.config.num_nextn_predict_layers:
            raise UserError(f"{folder} has no MTP layer (num_nextn_predict_layers is 0).")
        self.dtype = dtype
        self._pool = HostPool(hardware.probe(gpu=False).cores)
        source = ModelWeights(self.config, folder, mtp=True)
        try:
            weights = source.getter(dtype, "cpu")
            self.model = GLM5(self.config, weights)
            self.mtp = MTP(self.model, weights)
            layers = [*self.config.moe_layers, self.config.num_hidden_layers]
            host_only = dict.fromkeys(layers, np.full(self.config.n_routed_experts, -1))
            experts = source.experts(source.layout(method))
            self.experts = load_tiers(source, experts, host_only, device="cpu", pool=self._pool)
        finally:
            source.close()

    def __enter__(self) -> Drafter:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.close()

    def runs(self, texts: Iterable[tuple[list[int], int]], depth: int = DEPTH) -> list[list[int]]:
        """For each text with at least two tokens of its own the run lengths of its places. `texts`: the token ids of a
        prompt with its greedy continuation, and how many of them are the prompt's."""
        return [run_lengths(self.drafts(ids, n, depth), ids[n + 1 :]) for ids, n in texts if len(ids) > n + 1]

    @torch.inference_mode()
    def drafts(self, ids: list[int], first: int, depth: int = DEPTH) -> Tensor:
        """int64 [len(ids) - first - 1, depth]: drafts[j, d] is the draft for ids[first + j + 1 + d], when the tokens up
        to ids[first + j] are known, `first` ≥ 1. Drafts beyond the end of `ids` are made too."""
        T, tokens = len(ids), torch.tensor(ids)
        starts = torch.arange(first - 1, T - 2)  # the positions of the hidden states that the first drafts come from
        cache = Cache.allocate(
            self.config, T + depth * len(starts), dtype=str(self.dtype).removeprefix("torch."), device="cpu", mtp=True
        )
        hidden = self.model.forward(_whole(tokens), cache, self.experts)
        state = self.mtp.forward(hidden[:-1], _whole(tokens[1:]), cache, self.experts)[starts]
        drafts = [self.model.logits(state).argmax(-1)]
        for step in range(1, depth):
            rows = _continued(drafts[-1], starts, step, T)
            state = self.mtp.forward(state, rows, cache, self.experts)
            drafts.append(self.model.logits(state).argmax(-1))
        return torch.stack(drafts, 1)


def _whole(tokens: Tensor) -> Rows:
    """A sequence from its beginning, in the cache's first slots."""
    places = torch.arange(len(tokens))
    return Rows(tokens, places, places, [Segment(0, len(tokens), places)])


def _continued(tokens: Tensor, starts: Tensor, step: int, free: int) -> Rows:
    """One row for each start: its drafted token, `step` positions on, seeing the true entries up to the start and its
    own drafted ones. Those of step s lie in slots free + (s - 1)·len(starts) and on."""
    count = len(starts)
    slots = free + (step - 1) * count + torch.arange(count)
    segments = []
    for j, start in enumerate(starts.tolist()):
        own = free + j + count * torch.arange(step)
        segments.append(Segment(j, j + 1, torch.cat((torch.arange(start + 1), own))))
    return Rows(tokens, starts + step, slots, segments)


@dataclass(frozen=True)
class Acceptance:
    """Over all places of all texts. At index d - 1: `places` with at least d tokens to come, and at how many of them
    the first d drafts are all right. tokens_per_step: tokens for each pass of the model when every step drafts d (1
    without drafting)."""

    places: list[int]
    accepted: list[int]
    tokens_per_step: list[float]

    @property
    def shares(self) -> list[float]:
        return [a / p if p else float("nan") for a, p in zip(self.accepted, self.places, strict=True)]


def run_lengths(drafts: Tensor, following: list[int]) -> list[int]:
    """How many drafts of each place are right before the first wrong one; following[j] is the token after place j."""
    depth = drafts.shape[1]
    padded = torch.tensor([*following, *[-1] * (depth - 1)]).unfold(0, depth, 1)  # [places, depth]
    return (drafts == padded).int().cumprod(1).sum(1).tolist()


def count_accepted(runs_of: list[list[int]], depth: int = DEPTH) -> Acceptance:
    """From the runs of each text's places: at place j of n, n - j tokens are still to come."""
    places, accepted, per_step = [], [], []
    for d in range(1, depth + 1):
        whole = [run[: len(run) - d + 1] for run in runs_of if len(run) >= d]
        places.append(sum(map(len, whole)))
        accepted.append(sum(run >= d for text in whole for run in text))
        tokens, steps = sum(map(len, runs_of)), sum(_steps(run, d) for run in runs_of)
        per_step.append(tokens / steps if steps else float("nan"))
    return Acceptance(places, accepted, per_step)


def _steps(run: list[int], depth: int) -> int:
    """Passes of the model that give len(run) tokens: each gives one more than the drafts it accepts."""
    at = steps = 0
    while at < len(run):
        at += 1 + min(run[at], depth)
        steps += 1
    return steps
