"""A recorded trace holds every token once, where and when the engine computed it."""

from collections import Counter

import numpy as np
import pytest
from oracle import random_ids
from tiny import tiny_checkpoint

from hetero_glm5.core import SamplingParams
from hetero_glm5.llm import LLM
from hetero_glm5.quality.routing import recording
from hetero_glm5.quality.tracing import record

PROMPTS = [random_ids(20, seed=1), random_ids(9, seed=2), random_ids(13, seed=3)]
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
FLAGS = {"device": "cpu", "dtype": "float32", "skip_tokenizer": True}


@pytest.mark.parametrize(("together", "chunk"), [(1, 2048), (3, 2048), (2, 7)])
def test_every_token_comes_once(checkpoints, together, chunk):
    folder = tiny_checkpoint(checkpoints)
    with LLM(folder, **FLAGS, max_running_requests=together, chunked_prefill_size=chunk) as llm:
        trace = record(llm, ["a", "b", "c"], PROMPTS, PARAMS)
        answers = llm.generate(PROMPTS, PARAMS)
        alone = []
        for answer in answers:
            with recording(llm) as recorder:
                llm.logits((answer.prompt_token_ids + answer.token_ids)[:-1])
                alone.append(recorder.take())
    assert trace.kinds.tolist() == ["a", "b", "c"] and trace.layers.tolist() == [2, 3, 4] and trace.experts == 16
    for request, (prompt, want) in enumerate(zip(PROMPTS, alone, strict=True)):
        rows = trace.request == request
        assert trace.position[rows].tolist() == list(range(len(prompt) + 4))
        assert trace.decode[rows].tolist() == [False] * len(prompt) + [True] * 4
        assert np.array_equal(trace.ids[rows], want)
    steps = Counter(zip(trace.step.tolist(), trace.request.tolist(), strict=True))
    assert max(Counter(step for step, _ in steps).values()) == together
    assert (np.diff(trace.step) >= 0).all() and set(np.diff(trace.step)) <= {0, 1}
