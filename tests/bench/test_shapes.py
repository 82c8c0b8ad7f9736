"""The published sizes of GLM-5 follow from the dimensions and the name table."""

from __future__ import annotations

import math
import re

from shapes import GLM5, slice_config

from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.names import expected_tensors


def size(tensors):
    return sum(math.prod(spec.shape) for spec in tensors.values())


def test_glm5_as_published():
    config = ModelConfig.parse(GLM5)
    model, with_mtp = expected_tensors(config, mtp=False), expected_tensors(config, mtp=True)
    assert len(with_mtp) == 59_870
    assert len(with_mtp) - len(model) == 791
    assert round(size(model) / 1e9, 3) == 743.911
    assert round((size(with_mtp) - size(model)) / 1e9, 2) == 9.95
    assert len(with_mtp) + sum(spec.quantised for spec in with_mtp.values()) == 119_028  # FP8: a scale for each


def test_a_slice_keeps_every_layers_shape():
    config = slice_config(dense=1, moe=2, experts=16, vocab=1000, mtp=False)
    whole, part = (ModelConfig.parse(c) for c in (GLM5, config))
    assert part.mlp_layer_types == ("dense", "sparse", "sparse")
    full = expected_tensors(whole, mtp=False)
    for name, spec in expected_tensors(part, mtp=False).items():
        counterpart = re.sub(r"layers\.([12])\.", lambda match: f"layers.{int(match[1]) + 2}.", name)  # past the dense
        if full[counterpart].shape != spec.shape:
            assert name.endswith(("embed_tokens.weight", "lm_head.weight")) or ".mlp.gate." in name
