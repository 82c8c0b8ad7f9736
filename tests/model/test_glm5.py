"""Layer by layer against the oracle, so that a difference in the logits can be traced to where it begins."""

import pytest
import torch
from oracle import oracle, random_ids
from tiny import tiny_checkpoint
from tiny_model import load_model, rows_of

from hetero_glm5.model.glm5 import GLM5
from hetero_glm5.model.indexer import Indexer
from hetero_glm5.model.state import Cache, Step

T = 45
IDS = torch.tensor(random_ids(T))
ROWS = rows_of(IDS, (0, T, 0))
INDEX_SHARE = {"num_hidden_layers": 9, "index_topk_freq": 4, "index_skip_topk_offset": 3}


def load(folder) -> tuple[GLM5, object, Cache]:
    model, _, experts = load_model(folder)
    return model, experts, Cache.allocate(model.config, T, dtype="float32", device="cpu")


@pytest.mark.parametrize("share", [{}, INDEX_SHARE])
@torch.no_grad()
def test_each_layers_output_and_selection(checkpoints, share):
    folder = tiny_checkpoint(checkpoints, **share)
    seen = []
    reference = oracle(folder)
    for layer in reference.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    reference(IDS[None])

    model, experts, cache = load(folder)
    c = model.config
    x = torch.nn.functional.embedding(IDS, model.embedding)
    step = Step.of(ROWS, c)
    selection = [None] * len(step.groups)
    for i, (layer, (want_x, want_selection)) in enumerate(zip(model.layers, seen, strict=True)):
        x, selection = layer(x, step, cache, experts, selection)
        assert (x - want_x[0]).abs().max() <= 1e-4, f"layer {i}"
        for t in range(T):
            chosen = {s for s in selection[0][0, t].tolist() if s >= 0}
            assert len(chosen) == min(c.index_topk, t + 1)
            assert chosen == {s for s in want_selection[0, t].tolist() if 0 <= s <= t}, f"layer {i}, row {t}"


@torch.no_grad()
def test_a_half_split_indexer_would_choose_otherwise(checkpoints, monkeypatch):
    """The rotation of the indexer shows in the selection alone, so a test must look there."""
    folder = tiny_checkpoint(checkpoints)
    model, experts, cache = load(folder)
    want = model.logits(model.forward(ROWS, cache, experts))

    def half_split(self, x, rotation):
        cos, sin = (table.view(len(x), *[1] * (x.dim() - 2), -1) for table in (rotation.real, rotation.imag))
        turned, rest = x.split([self.config.qk_rope_head_dim, x.shape[-1] - self.config.qk_rope_head_dim], -1)
        a, b = turned.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    monkeypatch.setattr(Indexer, "_rotate", half_split)
    got = model.logits(model.forward(ROWS, cache, experts))
    assert (got - want)[: model.config.index_topk].abs().max() <= 1e-4
    assert (got - want).abs().max() > 1e-2
