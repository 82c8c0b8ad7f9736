"""The engine and the simulator hold the same experts on the device after every step of the same trace."""

from dataclasses import replace

import numpy as np
import pytest
from cheap_link import CHEAP_LINK, weigh_by
from oracle import LATENT_EPS, random_ids
from tiny import tiny_checkpoint

from hetero_glm5.core import SamplingParams
from hetero_glm5.llm import LLM
from hetero_glm5.placement.planner import Adaptive
from hetero_glm5.placement.simulate import replay
from hetero_glm5.placement.trace import Steps
from hetero_glm5.quality.tracing import record

COSTS = {  # of the link: so fast that much moves, and so slow that nearly nothing hides behind a step
    "fast": CHEAP_LINK,
    "slow": replace(CHEAP_LINK, link=4e8),
}
FLAGS = {"kt_enable_dynamic_expert_update": True, "kt_num_gpu_experts": 4, "max_total_tokens": 512, "page_size": 8}


def watched(planner: Adaptive) -> list[np.ndarray]:
    """Fills with slot_of after each step."""
    held, end_step = [], planner.end_step

    def end(*step):
        moves = end_step(*step)
        held.append(planner.slot_of.copy())
        return moves

    planner.end_step = end
    return held


@pytest.mark.parametrize("link", COSTS)
def test_step_for_step(checkpoints, monkeypatch, link):
    costs = COSTS[link]
    weigh_by(monkeypatch, costs)
    prompts = [random_ids(length, seed=length) for length in (30, 5, 61, 12, 44)]
    with LLM(tiny_checkpoint(checkpoints), device="cpu", dtype="float32", skip_tokenizer=True,
             latent_norm_eps=LATENT_EPS, max_running_requests=3, chunked_prefill_size=32, **FLAGS) as llm:  # fmt: skip
        planner = llm.engine.tiers.adaptation.planner
        first, in_engine = planner.slot_of.copy(), watched(planner)
        params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
        trace = record(llm, ["random"] * len(prompts), prompts, params)
    again = Adaptive(first, costs)
    simulated = watched(again)
    replay(Steps.of(trace), again, costs)
    assert len(in_engine) == len(simulated) > 60
    for step, (engine, simulator) in enumerate(zip(in_engine, simulated, strict=True)):
        assert np.array_equal(engine, simulator), f"step {step}"
    changes = sum((before != after).any() for before, after in zip([first, *in_engine], in_engine, strict=False))
    assert changes > 5
