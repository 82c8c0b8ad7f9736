"""Copies of a checkpoint: dense attention and FP8 experts."""

import pytest
from oracle import LATENT_EPS, oracle_logits, random_ids
from tiny import tiny_checkpoint

from hetero_glm5.core import UserError
from hetero_glm5.llm import LLM
from hetero_glm5.quality import variants
from hetero_glm5.quality.variants import dense_attention, fp8_experts

EXACT = {"device": "cpu", "dtype": "float32", "latent_norm_eps": LATENT_EPS, "skip_tokenizer": True}


def test_dense_attention_is_a_larger_index_topk(checkpoints, tmp_path):
    ids = random_ids(50)
    folder = tiny_checkpoint(checkpoints)
    with LLM(dense_attention(str(folder), tmp_path), **EXACT) as llm:
        got = llm.logits(ids)
    assert (got - oracle_logits(tiny_checkpoint(checkpoints, index_topk=64), ids)).abs().max() <= 1e-4
    assert (got - oracle_logits(folder, ids)).abs().max() > 1e-2
    assert '"index_topk": 16' in (folder / "config.json").read_text(), "the original must stay as it is"


def test_fp8_experts_are_near_the_originals(checkpoints, tmp_path):
    folder, ids = str(tiny_checkpoint(checkpoints, num_experts_per_tok=16)), random_ids(30)
    with LLM(folder, **EXACT) as llm:
        want = llm.logits(ids)
    with LLM(folder, **EXACT, kt_method="FP8", kt_weight_path=fp8_experts(folder, tmp_path)) as llm:
        assert llm.engine.config.kt_method == "FP8"
        error = (llm.logits(ids) - want).norm() / want.norm()
    assert 0.001 < error < 0.1


def test_an_fp8_checkpoint_needs_no_copy(checkpoints, tmp_path):
    folder = str(tiny_checkpoint(checkpoints, fp8=True))
    assert fp8_experts(folder, tmp_path) == folder and not list(tmp_path.iterdir())


def test_a_large_copy_is_refused(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "MOST_FP8_BYTES", 1 << 20)
    with pytest.raises(UserError, match="would take .* GiB in FP8.*Leave FP8 out of --methods"):
        fp8_experts(str(tiny_checkpoint(checkpoints)), tmp_path)
    assert not list(tmp_path.iterdir())
