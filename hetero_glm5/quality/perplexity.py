"""Perplexity: exp of the mean -ln p(next token), over the tokens that are the model's to write."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_glm5.llm import LLM
from hetero_glm5.quality.texts import Text

BLOCK = 256  # rows taken to fp64 at a time


@dataclass(frozen=True)
class Loss:
    """The sum of -ln p over `tokens` tokens."""

    nats: float = 0.0
    tokens: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.nats + other.nats, self.tokens + other.tokens)

    @property
    def perplexity(self) -> float:
        """NaN over no tokens, infinite where a float cannot hold it."""
        if not self.tokens:
            return math.nan
        mean = self.nats / self.tokens
        return math.inf if mean > 700 else math.exp(mean)


def total(losses: Iterable[Loss]) -> Loss:
    return sum(losses, Loss())


def token_losses(logits: Tensor, ids: list[int]) -> Tensor:
    """-ln p(ids[i + 1] | ids[: i + 1]), fp64 [T - 1], from logits [T, vocab]."""
    targets = torch.tensor(ids[1:], dtype=torch.int64)
    rows = zip(logits[:-1].split(BLOCK), targets.split(BLOCK), strict=True)
    return torch.cat([F.cross_entropy(block.double(), target, reduction="none") for block, target in rows])


def losses(llm: LLM, text: Text, start: int = 1) -> tuple[Loss, Loss]:
    """Of the model's own tokens, and of all, at positions `start` ≥ 1 and later."""
    each = token_losses(llm.logits(text.ids), text.ids)[start - 1 :]
    own = each[torch.tensor(text.own[start:], dtype=torch.bool)]
    return Loss(own.sum().item(), len(own)), Loss(each.sum().item(), len(each))


def losses_by_kind(llm: LLM, texts: Iterable[Text]) -> dict[str, Loss]:
    """Of the model's own tokens."""
    found: dict[str, Loss] = {}
    for text in texts:
        found[text.kind] = found.get(text.kind, Loss()) + losses(llm, text)[0]
    return found
