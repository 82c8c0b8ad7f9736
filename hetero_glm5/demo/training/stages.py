"""What each stage trains, and its loss.

dense    the model with attention to all earlier tokens; no indexer
indexer  the indexers alone, from the attention of the dense model, which is frozen
sparse   the model with index_topk in force, and the indexers from what they select
mtp      the MTP layer alone, the model frozen; its indexer from its dense attention
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hetero_glm5.demo.training.data import Batch
from hetero_glm5.demo.training.forward import Forward
from hetero_glm5.demo.training.indexer import Indexing
from hetero_glm5.demo.training.kernels import CHUNK, CrossEntropy
from hetero_glm5.demo.training.model import Demo, mtp_hidden
from hetero_glm5.demo.training.optimizer import Rates

LONG = 8192  # above all documents
INDEXER_SHARE = 1.0  # of KL in the loss


class Watch:
    """Sees into the layers: how many tokens each expert gets, what the indexers select and learn."""

    def __init__(self, gates: list[nn.Module], experts: int, select: list[nn.Module], learn: list[nn.Module]):
        self.place = {id(gate): i for i, gate in enumerate(gates)}
        self.counts = torch.zeros(len(gates), experts)
        self.select, self.learn = {id(m) for m in select}, {id(m) for m in learn}
        self.indexings: list[Indexing] = []
        self.scale = 0.0  # of KL in the loss; 0: only measured

    def attention(self, module: Any, inputs: tuple[Tensor, Tensor], rotation: tuple[Tensor, Tensor]) -> Indexing | None:
        select, learn = id(module) in self.select, id(module) in self.learn
        if not select and not learn:
            return None
        indexing = Indexing(module.indexer, inputs, rotation)
        indexing.select, indexing.scale = select, self.scale if learn else None
        self.indexings.append(indexing)
        return indexing

    def load(self, gate: nn.Module, counts: Tensor) -> None:
        if id(gate) in self.place:
            self.counts[self.place[id(gate)]] += counts

    def divergence(self) -> tuple[float, int]:
        """Sum of KL over rows and layers, and of how many."""
        return sum(i.divergence for i in self.indexings), sum(i.rows for i in self.indexings)


@dataclass
class Scored:
    """The loss to minimise (None: gradients are there already), and each row's cross entropy."""

    loss: Tensor | None
    each: Tensor
    weights: Tensor
    kinds: Tensor


class Dense:
    """the model, with attention to all earlier tokens"""

    name, before = "dense", ""
    rates = Rates(matrix=0.01, table=0.004)

    def __init__(self, demo: Demo, *, compiled: bool = True, dtype: torch.dtype = torch.bfloat16):
        self.demo, self.forward = demo, Forward(demo.trunk.config, compiled=compiled, dtype=dtype)

    @staticmethod
    def parameters(demo: Demo) -> dict[str, nn.Parameter]:
        return {name: p for name, p in demo.named_parameters() if _in_trunk(name) and "indexer" not in name}

    @staticmethod
    def gates(demo: Demo) -> list[nn.Module]:
        return [layer.mlp.gate for layer in demo.trunk.model.layers if hasattr(layer.mlp, "gate")]

    def documents(self, share: float) -> tuple[float, int, int]:
        """What to learn from when `share` of the tokens is done: the length of batches, as a share of the largest, and
        of documents, from and to. Small steps take a model far at first, and long documents, whose attention costs, are
        of use when short ones are understood."""
        return (0.5, 0, 1024) if share < 0.5 else (1.0, 0, LONG)

    def watch(self) -> Watch:
        return Watch(self.gates(self.demo), self.demo.trunk.config.n_routed_experts, *self.indexers())

    def indexers(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The attention modules whose indexers select, and those whose indexers learn."""
        return [], []

    def loss(self, batch: Batch, watch: Watch) -> Scored:
        return self.cross_entropy(self.hidden(batch, watch), batch)

    def hidden(self, batch: Batch, watch: Watch) -> Tensor:
        return self.forward.trunk(self.demo.trunk.model, batch.tokens, batch.positions, batch.spans, watch)

    def cross_entropy(self, hidden: Tensor, batch: Batch) -> Scored:
        head, kernels = self.demo.trunk.lm_head.weight, self.forward.kernels
        rows, weights = hidden.index_select(0, batch.rows), batch.weights / len(batch.tokens)
        loss, each = CrossEntropy.apply(rows, head, batch.targets, weights, kernels)
        return Scored(loss, each, batch.weights, batch.kinds)


class Indexers(Dense):
    """the indexers, from the attention of the dense model"""

    name, before = "indexer", "dense"
    rates = Rates(matrix=0.01, table=0.002, weight_decay=0.0)

    @staticmethod
    def parameters(demo: Demo) -> dict[str, nn.Parameter]:
        return {name: p for name, p in demo.named_parameters() if _in_trunk(name) and "indexer" in name}

    @staticmethod
    def gates(demo: Demo) -> list[nn.Module]:
        return []

    def documents(self, share: float) -> tuple[float, int, int]:
        return 1.0, self.demo.trunk.config.index_topk, LONG

    def indexers(self) -> tuple[list[nn.Module], list[nn.Module]]:
        return [], [layer.self_attn for layer in self.demo.trunk.model.layers]

    def loss(self, batch: Batch, watch: Watch) -> Scored:
        with torch.no_grad():
            self.hidden(batch, watch)
        nothing = torch.empty(0)
        return Scored(None, nothing, nothing, nothing.long())


class Sparse(Dense):
    """the model with index_topk in force, and its indexers"""

    name, before = "sparse", "indexer"
    rates = Rates(matrix=0.001, table=0.0004)

    @staticmethod
    def parameters(demo: Demo) -> dict[str, nn.Parameter]:
        return {name: p for name, p in demo.named_parameters() if _in_trunk(name)}

    def documents(self, share: float) -> tuple[float, int, int]:
        return 1.0, 0, LONG

    def indexers(self) -> tuple[list[nn.Module], list[nn.Module]]:
        modules = [layer.self_attn for layer in self.demo.trunk.model.layers]
        return modules, modules


class MTP(Dense):
    """the MTP layer; the model is frozen"""

    name, before = "mtp", "sparse"
    rates = Rates(matrix=0.01, table=0.004)

    @staticmethod
    def parameters(demo: Demo) -> dict[str, nn.Parameter]:
        return {name: p for name, p in demo.named_parameters() if not _in_trunk(name)}

    @staticmethod
    def gates(demo: Demo) -> list[nn.Module]:
        return [demo.mtp.layer.mlp.gate]

    def indexers(self) -> tuple[list[nn.Module], list[nn.Module]]:
        return [layer.self_attn for layer in self.demo.trunk.model.layers], [self.demo.mtp.layer.self_attn]

    def loss(self, batch: Batch, watch: Watch) -> Scored:
        """Of the token after next from the model's states, and, weighted half, of the one after that from the layer's
        own: a second draft."""
        with torch.no_grad():
            hidden = self.hidden(batch, watch)
        following = batch.tokens.roll(-1)
        first = mtp_hidden(self.forward, self.demo, hidden, (following, batch.positions), batch.spans, watch)
        scored = self.cross_entropy(first, _earlier(batch, 1))
        own = torch.cat((hidden[:1], first[:-1]))  # what a second draft gets at a position: m of the one before
        second = mtp_hidden(self.forward, self.demo, own, (following, batch.positions), batch.spans, None)
        assert scored.loss is not None
        scored.loss = scored.loss + 0.5 * self.cross_entropy(second, _earlier(batch, 2)).loss
        return scored


def _in_trunk(name: str) -> bool:
    return name.startswith("trunk.")


def _earlier(batch: Batch, least: int) -> Batch:
    """The same targets, predicted one row earlier; the first `least` of a document's have too little before them."""
    keep = (batch.positions[batch.rows] >= least) & (batch.weights > 0)
    fill = -int(keep.sum()) % CHUNK
    rows, targets, weights, kinds = (
        torch.cat((t[keep], t.new_zeros(fill))) for t in (batch.rows - 1, batch.targets, batch.weights, batch.kinds)
    )
    return Batch(batch.tokens, batch.positions, batch.spans, rows, targets, weights, kinds)


STAGES = {stage.name: stage for stage in (Dense, Indexers, Sparse, MTP)}
