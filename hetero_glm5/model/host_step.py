"""A step on CPU cores: what its rows see of the cached keys, over _C.

What ops.select_slots and ops.attend_* compute, row by row, without copies of the keys that a row reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hetero_glm5 import _C
from hetero_glm5.model.key_store import KeyStore
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.quantize import host_array

if TYPE_CHECKING:
    from hetero_glm5.model.state import Cache, Rows

FEW_ELEMENTS = 1 << 17  # of hidden states


def most_few_rows(config: ModelConfig) -> int:
    """Rows of a step of few. With more torch, which takes milliseconds to begin, multiplies quicker: at GLM-5's shapes
    in BF16 from some twenty on."""
    return FEW_ELEMENTS // config.hidden_size


class HostStep:
    """Remembers which positions the latest indexer chose. few: it is for few_rows.

    Queries are [T, heads, width of a key], of any type, results fp32; T rows, all of them in segments."""

    def __init__(self, space: _C.DenseWorkspace, rows: Rows, cache: Cache, config: ModelConfig):
        self.rows, self.cache, self._space = rows, cache, space
        runs = [(segment.stop - segment.start, segment.context.numpy()) for segment in rows.segments]
        places = rows.positions.numpy(), rows.slots.numpy()
        self.few = len(rows.token_ids) <= most_few_rows(config)
        self.c = _C.DenseStep(*places, runs, config.qk_rope_head_dim, config.rope_theta, config.index_topk)

    def choose(self, q: Tensor, head_weights: Tensor, keys: KeyStore) -> None:
        """For each row that sees more than index_topk positions those with the highest ops.index_scores; of equal ones
        the first. head_weights [T, heads]."""
        self.c.select(self._space, _floats(q), _floats(head_weights), stored(keys))

    def attend(self, q: Tensor, keys: KeyStore, scale: float, latent: int) -> Tensor:
        """softmax(scale · q · key) over what each row sees, or chose, mixes the keys' first columns: [T, heads,
        latent]."""
        mixed = torch.empty(*q.shape[:2], latent)
        self.c.attend(self._space, _floats(q), stored(keys), scale, mixed.numpy())
        return mixed


def stored(keys: KeyStore) -> np.ndarray:
    """[slots, elements of a row], in which _C tells the format by the type."""
    return host_array("keys", keys.rows)


def _floats(x: Tensor) -> np.ndarray:
    return x.float().contiguous().numpy()
