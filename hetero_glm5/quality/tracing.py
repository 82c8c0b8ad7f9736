"""Records routing while the engine answers requests."""

from __future__ import annotations

import numpy as np

from hetero_glm5.core import SamplingParams
from hetero_glm5.llm import LLM
from hetero_glm5.placement.trace import Trace
from hetero_glm5.quality.routing import recording


def record(llm: LLM, kinds: list[str], prompts: list[list[int]], params: SamplingParams) -> Trace:
    """Answers `prompts`, token ids, each of a kind, and returns how their tokens were routed. All are queued at once:
    at most --max-running-requests run together. Raises RequestError and QueueFull."""
    engine = llm.engine
    number = {engine.add(prompt, params): i for i, prompt in enumerate(prompts)}
    ids, rows = [], []
    step = 0
    with recording(llm) as recorder:
        while engine.busy:
            engine.step()
            if not engine.batch.chunks:
                continue
            ids.append(recorder.take())
            computed = engine.runner.computed
            assert computed is not None
            for (seq, first), segment in zip(computed.chunks, computed.rows.segments, strict=True):
                decoded = first >= seq.num_prompt
                rows += [(step, number[seq], first + i, decoded) for i in range(segment.stop - segment.start)]
            step += 1
    columns = np.array(rows, dtype=np.int64).T
    config = engine.model_config
    return Trace(
        ids=np.concatenate(ids),
        step=columns[0],
        request=columns[1],
        position=columns[2],
        decode=columns[3].astype(bool),
        layers=np.array(config.moe_layers),
        kinds=np.array(kinds),
        experts=config.n_routed_experts,
    )
