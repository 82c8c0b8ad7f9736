"""The same tokens on a CUDA device, whatever tier the experts are on. Runs where there is one."""

import pytest
import torch
from oracle import random_ids
from tiny import tiny_checkpoint

from hetero_glm5.core import SamplingParams
from hetero_glm5.llm import LLM
from hetero_glm5.model_config import DEMO

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPTS = [random_ids(30, seed=1), random_ids(5, seed=2), random_ids(61, seed=3)]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def load(folder, device, ratio, **flags) -> LLM:
    flags = {"max_total_tokens": 512, "page_size": 8, "kt_gpu_experts_ratio": ratio} | flags
    return LLM(folder, device=device, skip_tokenizer=True, **flags)


def generate(folder, device, ratio, params=GREEDY) -> list[list[int]]:
    with load(folder, device, ratio, dtype="float32") as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_cuda_gives_the_tokens_of_the_cpu(checkpoints, ratio):
    folder = tiny_checkpoint(checkpoints)
    assert generate(folder, "cuda", ratio) == generate(folder, "cpu", 0.0)


def test_seeded_draws_are_those_of_the_cpu(checkpoints):
    folder = tiny_checkpoint(checkpoints)
    params = SamplingParams(max_tokens=16, seed=4, top_p=0.9, ignore_eos=True)
    assert generate(folder, "cuda", 0.4, params) == generate(folder, "cpu", 0.0, params)


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("fp8", [False, True])
def test_what_is_served_agrees_within_its_rounding(checkpoints, fp8, ratio):
    """bf16 with BF16 or FP8 experts. Nothing is chosen closely: dense attention, every expert (see test_oracle.py)."""
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", fp8=fp8, index_topk=64, num_experts_per_tok=16)
    with load(folder, "cpu", 0.0, dtype="float32") as llm:
        want = llm.logits(PROMPTS[0])
    with load(folder, "cuda", ratio) as llm:
        got = llm.logits(PROMPTS[0])
    assert ((got - want).norm() / want.norm()) < 0.02


@pytest.mark.parametrize("flags", [{}, {"speculative_algorithm": "MTP"}, {"kv_cache_dtype": "fp8_e4m3"}], ids=str)
def test_reuse_drafts_and_restored_pages(tmp_path, flags):
    """The demo model, each prompt again after its answer, then once more from disk."""
    prompts = [f"[gMASK]<sop><|user|>Tell me a story of {name}.<|assistant|></think>" for name in ("Ann", "Bob")]
    flags = {"max_total_tokens": 2048, "page_size": 16, "dtype": "float32", **flags}
    with LLM(DEMO, device="cpu", **flags) as llm:
        want = [output.text for output in llm.generate(prompts, GREEDY)]
    for _ in range(2):
        with LLM(DEMO, device="cuda", kv_disk_path=str(tmp_path), kv_host_size=0.1, **flags) as llm:
            for _ in range(2):
                outputs = llm.generate(prompts, GREEDY)
                assert [output.text for output in outputs] == want
            assert all(output.num_cached >= len(output.prompt_token_ids) - 1 for output in outputs)
