"""A model of the KV cache for the scheduler's tests: each slot says which tokens its entry was computed from.

An entry is the whole sequence of tokens up to and including its own. Computing a row checks that every earlier entry of
its sequence is the right one, so a page that is shared, copied, restored or freed wrongly cannot go unseen. The next
token is a function of the tokens so far, from a small vocabulary, so that sequences and guesses often agree.
"""

import random
import zlib
from collections.abc import Sequence as Run

from hetero_glm5.core import Batch, Drawn, Sequence

VOCAB = 4


def next_token(tokens: Run[int]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCAB


def continuation(prompt: Run[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class KvModel:
    def __init__(self, pages: int, page_size: int):
        self.size = page_size
        self.slots: list[tuple[int, ...] | None] = [None] * (pages * page_size)

    def read_page(self, page: int) -> tuple:
        return tuple(self.slots[page * self.size : (page + 1) * self.size])

    def forward(self, batch: Batch) -> list[list[Drawn]]:
        """Computes the batch; what its rows draw, as the sampler would give it."""
        for page, content in batch.restored:
            self.slots[page * self.size : (page + 1) * self.size] = content
        sources = [self.read_page(copy.source) for copy in batch.copies]  # all are read before any is written
        for copy, source in zip(batch.copies, sources, strict=True):
            target = copy.target * self.size
            self.slots[target : target + copy.count] = source[: copy.count]
        return [self._compute(chunk) for chunk in batch.chunks]

    def _compute(self, chunk) -> list[Drawn]:
        seq, at = chunk.seq, chunk.start
        tokens = [*seq.tokens[: at + chunk.count], *chunk.drafts]
        for position in range(at):
            assert self.slots[self._slot(seq, position)] == tuple(tokens[: position + 1]), "an entry is not its own"
        for position in range(at, len(tokens)):
            self.slots[self._slot(seq, position)] = tuple(tokens[: position + 1])
        drawn: list[Drawn] = []
        for ahead in range(chunk.num_draws):
            drawn.append(Drawn(next_token(seq.tokens + list(chunk.drafts[:ahead]))))
            if ahead < len(chunk.drafts) and drawn[-1].token != chunk.drafts[ahead]:
                break
        return drawn

    def _slot(self, seq: Sequence, position: int) -> int:
        return seq.pages[position // self.size] * self.size + position % self.size


def guess(seq: Sequence, rng: random.Random, most: int) -> tuple[int, ...]:
    """Drafts, right more often than not."""
    right = continuation(seq.tokens, rng.randint(0, most))
    return tuple(token if rng.random() < 0.8 else rng.randrange(VOCAB) for token in right)
