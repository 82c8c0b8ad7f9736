"""What becomes of drafts, counted where an engine chooses how many to make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hetero_glm5.engine.draft_depth import DraftDepth

MOST = 4


@dataclass
class Tally:
    """What became of drafts: `tried` and `right` by depth, while those before were right."""

    steps: int = 0
    tokens: int = 0
    tried: list[int] = field(default_factory=lambda: [0] * MOST)
    right: list[int] = field(default_factory=lambda: [0] * MOST)

    def add(self, drafts: int, accepted: int) -> None:
        self.steps += 1
        self.tokens += 1 + accepted
        for j in range(min(accepted + 1, drafts)):
            self.tried[j] += 1
            self.right[j] += j < accepted

    def __add__(self, other: Tally) -> Tally:
        by_depth = zip(self.tried, other.tried, strict=True), zip(self.right, other.right, strict=True)
        tried, right = ([a + b for a, b in pairs] for pairs in by_depth)
        return Tally(self.steps + other.steps, self.tokens + other.tokens, tried, right)

    def row(self) -> dict[str, Any]:
        shares = [r / t for r, t in zip(self.right, self.tried, strict=True) if t]
        per_step = self.tokens / self.steps if self.steps else 1.0
        return {"tokens/step": per_step, "accepted": " ".join(f"{share:.2f}" for share in shares)}


class Depth(DraftDepth):
    """Keeps a tally; with `fixed` it always chooses that."""

    def __init__(self, most: int, fixed: int | None = None):
        super().__init__(most)
        self.fixed, self.tally = fixed, Tally()

    def choose(self, sequences: int) -> int:
        return super().choose(sequences) if self.fixed is None else self.fixed

    def verified(self, drafts: int, accepted: int) -> None:
        super().verified(drafts, accepted)
        self.tally.add(drafts, accepted)
