"""Where the time of an engine's decode steps goes, the model aside.

Stand-ins before the engine's parts charge a clock with their methods' calls; a part's time leaves out the parts that it
calls. All but "model" is the engine's own. The stand-ins take a few microseconds a call themselves, so that the sum
should be measured without `parts`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from harness import synchroniser

from hetero_glm5.core import Clock, SamplingParams
from hetero_glm5.engine.engine import Engine

WARMUP = 10  # steps
PROMPT = 64  # tokens
PARTS = {  # of Engine: the methods whose time is told apart, and under what name
    "scheduler": {"expire": "schedule", "schedule": "schedule", "commit": "commit"},
    "runner": {"forward": "runner", "unsound": "sampling"},
    "sampler": {"__call__": "sampling"},
    "tiers": {"begin_step": "recording", "end_step": "recording"},
    "drafter": {"draft": "drafting"},
}
TENSORS = {"rows": "tensors"}
WORK = dict.fromkeys(("forward", "logits", "remember"), "model")


class Timed:
    """Stands before an object and charges a clock's parts with calls of its methods."""

    def __init__(self, inner: Any, clock: Clock, parts: dict[str, str]):
        self._inner, self._clock, self._parts = inner, clock, parts

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return partial(self._timed, name, value) if name in self._parts else value

    def __call__(self, *args: Any) -> Any:
        return self._timed("__call__", self._inner, *args)

    def _timed(self, name: str, method: Callable[..., Any], *args: Any) -> Any:
        with self._clock(self._parts[name]):
            return method(*args)


@contextmanager
def timed(engine: Engine, clock: Clock, parts: bool) -> Iterator[None]:
    """Charges the model's work to "model"; with `parts` also the engine's, to where it is done."""
    runner, drafter = engine.runner, engine.drafter
    charged = [(runner, "model", WORK), *([(drafter, "mtp", WORK), (drafter.mtp, "model", WORK)] if drafter else [])]
    if parts:
        charged += [(runner, "tensors", TENSORS), *((engine, name, methods) for name, methods in PARTS.items())]
    before = [(owner, name, getattr(owner, name), methods) for owner, name, methods in charged]
    for owner, name, inner, methods in before:
        if inner is not None:
            setattr(owner, name, Timed(inner, clock, methods))
    try:
        yield
    finally:
        for owner, name, inner, _ in before:
            setattr(owner, name, inner)


def decode_steps(
    engine: Engine, params: SamplingParams, batch: int, steps: int, *, parts: bool
) -> list[dict[str, float]]:
    """Seconds by part of each step, after a few that warm up. Prompts of random tokens."""
    rng = random.Random(0)
    vocab, sync = engine.model_config.vocab_size, synchroniser(engine.config.device)
    prompts = [[rng.randrange(vocab) for _ in range(PROMPT)] for _ in range(batch)]
    seqs = [engine.add(prompt, params) for prompt in prompts]
    found = []
    clock = Clock(sync)
    while not all(seq.decoding for seq in seqs):
        engine.step()
    with timed(engine, clock, parts):
        for _ in range(WARMUP + steps):
            clock.seconds.clear()
            with clock("rest"):
                engine.step()
            found.append({**clock.seconds})
    for seq in seqs:
        engine.abort(seq)
    engine.step()  # what the last one left to do
    return found[WARMUP:]
