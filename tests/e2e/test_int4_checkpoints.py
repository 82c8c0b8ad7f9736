"""INT4 checkpoints through the whole engine; the oracle is the same model dequantised to fp32."""

import pytest
import torch
from int4 import KINDS, int4_checkpoint
from oracle import random_ids

from hetero_glm5.llm import LLM
from hetero_glm5.weights.convert import Conversion

SMOOTH = {"index_topk": 64, "num_experts_per_tok": 16}  # no choice that a small difference could flip
IDS = random_ids(50)


def logits(folder, method="auto", **flags):
    flags = {"device": "cpu", "dtype": "float32", "skip_tokenizer": True, "max_total_tokens": 256} | flags
    with LLM(folder, kt_method=method, **flags) as llm:
        return llm.logits(IDS), llm.engine.config.kt_method


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_it_is_the_plain_model(checkpoints, kind, dense):
    folder = int4_checkpoint(checkpoints, kind, dense=dense)
    got, method = logits(folder)
    want, _ = logits(folder.with_name(f"{folder.name}-plain"))
    assert method == "FP32" and want.abs().max() > 1 and torch.equal(got, want)


@pytest.mark.parametrize(("kind", "group"), [(KINDS[0], 32), ("gptq", 64), ("gptq_v2", 128)])
def test_int4_differs_by_the_rounding_of_activations(checkpoints, tmp_path, kind, group):
    """On the host, on the device and divided between them; from the checkpoint and from a store of it, the same."""
    folder = int4_checkpoint(checkpoints, kind, group, torch.float16, **SMOOTH)
    want, _ = logits(folder.with_name(f"{folder.name}-plain"))
    Conversion(folder, tmp_path, "INT4").run(2)
    for on_device in (0, 7, 16):
        got, method = logits(folder, "RAWINT4", kt_num_gpu_experts=on_device)
        assert method == "INT4" and (got - want).norm() / want.norm() < (0.01 if on_device < 16 else 1e-5)
        stored, _ = logits(folder, kt_num_gpu_experts=on_device, kt_weight_path=str(tmp_path))
        assert torch.equal(stored, got)


def test_auto_keeps_int4(checkpoints):
    """Also where only --kt-weight-path is INT4."""
    folder = int4_checkpoint(checkpoints, KINDS[0], 64, **SMOOTH)
    plain = folder.with_name(f"{folder.name}-plain")
    want, method = logits(plain, dtype="bfloat16")
    assert method == "BF16"
    for model, experts in ((folder, None), (plain, str(folder))):
        got, method = logits(model, dtype="bfloat16", kt_weight_path=experts)
        assert method == "INT4" and (got - want).norm() / want.norm() < 0.03
