"""The same tokens on a CUDA device, whatever tier the experts are on. Runs where there is one."""

import pytest
import torch
from oracle import random_ids
from tiny import tiny_checkpoint

from hetero_glm5.core import SamplingParams
from hetero_glm5.llm import LLM

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPTS = [random_ids(30, seed=1), random_ids(5, seed=2), random_ids(61, seed=3)]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def generate(folder, device, ratio) -> list[list[int]]:
    flags = {"max_total_tokens": 512, "page_size": 8, "kt_gpu_experts_ratio": ratio}
    with LLM(folder, device=device, dtype="float32", skip_tokenizer=True, **flags) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_cuda_gives_the_tokens_of_the_cpu(checkpoints, ratio):
    folder = tiny_checkpoint(checkpoints)
    assert generate(folder, "cuda", ratio) == generate(folder, "cpu", 0.0)
