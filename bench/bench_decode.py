"""Where a decode step's time goes: milliseconds, bytes and share of the bandwidth roof, part by part.

    python bench/bench_decode.py --model SLICE [--batch 1] [--prompt 128] [--steps 32] [--json] [engine flags]

A slice from make_slice.py has GLM-5's true layer shapes, so a layer takes as long here as there. Bytes are what a
step has to read at least: each weight once, each distinct routed expert once, the selected cache rows. The roof
is probed before and after the measured steps, and the better probe counts. "python" is what the engine's clock does not
name: a clocked step's wall time less all named parts. "step" is timed without the clock; where a GPU works beside the
host, it takes less time than its parts together. On a CPU the indexer is a part of the attention, and the router one of
the shared expert.
"""

from __future__ import annotations

import hetero_glm5  # noqa: F401, before torch: it bounds the spinning of torch's threads

# isort: split
import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from harness import GB, Row, Timing, print_json, print_table, read_roof, synchroniser

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import Clock, SamplingParams, Sequence, UserError, no_clock
from hetero_glm5.engine.engine import Engine
from hetero_glm5.flags import add_flags, from_args
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.names import layer_tensors

PARTS = (
    "attention",
    "indexer",
    "router",
    "host_experts",
    "device_experts",
    "shared_expert",
    "dense_mlp",
    "lm_head",
    "sampling",
)
SCORING = ("indexer.wq_b.weight", "indexer.weights_proj.weight")  # read only when a choice is to be made
WITHIN = {"indexer": "attention", "router": "shared_expert"}  # where a clock does not tell them apart
WARMUP = 3


class RoutingRecorder:
    """Stands before the engine's experts and keeps the ids that each layer asked for; costs one append a layer."""

    def __init__(self, experts):
        self.experts = experts
        self.calls: list[tuple[int, torch.Tensor]] = []

    def __call__(self, layer, x, ids, weights, clock):
        self.calls.append((layer, ids))
        return self.experts(layer, x, ids, weights, clock)


@dataclasses.dataclass(frozen=True)
class Step:
    """Two neighbouring decode steps, one timed whole and one by part."""

    wall: float  # seconds of the step without a clock inside
    parts: dict[str, float]  # seconds by part
    contexts: list[int]  # cached positions of each sequence
    routing: list[tuple[int, torch.Tensor]]  # layer, ids [batch, k]


def prefill(engine: Engine, batch: int, prompt: int, new_tokens: int) -> list[Sequence]:
    """Starts `batch` sequences of random tokens and steps until all of them decode."""
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    shape = (batch, prompt)
    prompts = torch.randint(engine.model_config.vocab_size, shape, generator=generator).tolist()
    seqs = [engine.add(tokens, params) for tokens in prompts]
    while not all(seq.decoding for seq in seqs):
        engine.step()
    return seqs


def new_tokens(steps: int) -> int:
    """Tokens that a sequence gets: the prefill's, and two for each pair of steps, with one to spare."""
    return 2 * (WARMUP + steps) + 2


def decode(engine: Engine, seqs: list[Sequence], steps: int) -> list[Step]:
    """Measures `steps` pairs of decode steps after a few that warm up. A clock waits for the device between parts and
    so takes away their overlap: the step itself is timed without one."""
    sync = synchroniser(engine.config.device)
    tiers = engine.runner.experts
    recorder = engine.runner.experts = RoutingRecorder(tiers)
    measured = []
    for _ in range(WARMUP + steps):
        engine.clock, recorder.calls = no_clock, []
        wall = timed(engine, sync)
        recorder.calls = []  # of the clocked step, whose contexts follow
        clock = engine.clock = Clock(sync)
        contexts = [len(seq.tokens) for seq in seqs]
        clocked = timed(engine, sync)
        parts = clock.seconds | {"python": clocked - sum(clock.seconds.values())}
        measured.append(Step(wall, parts, contexts, recorder.calls))
    engine.runner.experts = tiers
    return measured[WARMUP:]


def timed(engine: Engine, sync: Callable[[], None]) -> float:
    sync()
    start = time.perf_counter()
    engine.step()
    sync()
    return time.perf_counter() - start


def part_of(name: str) -> str | None:
    """The part of the step that reads this weight; None for the norms between parts."""
    for mark, part in (
        ("self_attn.indexer.", "indexer"),
        ("self_attn.", "attention"),
        ("mlp.gate.", "router"),
        ("mlp.shared_experts.", "shared_expert"),
        ("mlp.", "dense_mlp"),
    ):
        if mark in name:
            return part
    return None


def weight_bytes(config: ModelConfig, itemsize: int, scores: bool) -> Counter[str]:
    """Bytes of the weights outside the routed experts that one step reads, by part.

    The router's are fp32. Unless some context exceeds index_topk the indexer `scores` nothing and only makes its keys.
    """
    total = Counter(lm_head=config.vocab_size * config.hidden_size * itemsize)
    for layer in range(config.num_hidden_layers):
        for name, spec in layer_tensors(config, layer).items():
            part = part_of(name)
            if part is None or (not scores and name.endswith(SCORING)):
                continue
            total[part] += torch.Size(spec.shape).numel() * (4 if part == "router" else itemsize)
    return total


def step_bytes(engine: Engine, step: Step) -> Counter[str]:
    """Bytes that `step` had to read, by part."""
    config = engine.model_config
    itemsize = getattr(torch, engine.config.dtype).itemsize
    cached = getattr(torch, engine.config.kv_cache_dtype).itemsize
    long = [context for context in step.contexts if context > config.index_topk]
    total = weight_bytes(config, itemsize, scores=bool(long))
    rows = sum(min(context, config.index_topk) for context in step.contexts)
    total["attention"] += rows * config.latent_dim * cached * config.num_hidden_layers
    total["indexer"] += sum(long) * config.index_head_dim * cached * config.indexer_types.count("full")
    total["sampling"] = len(step.contexts) * config.vocab_size * 4
    for part, whole in WITHIN.items():
        if part not in step.parts:
            total[whole] += total.pop(part)
    tiers = engine.tiers
    for layer, ids in step.routing:
        on_device = tiers.slots(layer)[ids.unique()] >= 0
        total["device_experts"] += int(on_device.sum()) * tiers.device.layout.blob_bytes
        total["host_experts"] += int((~on_device).sum()) * tiers.device.layout.blob_bytes
    return total


def rows_of(engine: Engine, steps: list[Step], roofs: dict[str, float]) -> list[Row]:
    read = [step_bytes(engine, step) for step in steps]
    rows = []
    for part in (*PARTS, "python"):
        if any(part in step.parts for step in steps):
            timing = Timing(tuple(step.parts.get(part, 0.0) for step in steps))
            memory = "cpu" if part == "host_experts" else engine.config.device
            rows.append(Row(part, timing, sum(r[part] for r in read) / len(read), roofs[memory]))
    total = sum(sum(r.values()) for r in read) / len(read)
    one_memory = roofs["cpu"] if len(roofs) == 1 else 0.0  # two memories have no common roof
    return [*rows, Row("step", Timing(tuple(step.wall for step in steps)), total, one_memory)]


def parse_args() -> tuple[argparse.Namespace, EngineConfig]:
    parser = argparse.ArgumentParser(description="Time the parts of a decode step.")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens of each sequence")
    parser.add_argument("--steps", type=int, default=32, help="measured steps")
    parser.add_argument("--roof-mb", type=int, default=2048, help="size of the bandwidth probe; far above the caches")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    add_flags(parser, EngineConfig, "engine")
    args = parser.parse_args()
    config = from_args(EngineConfig, args)
    length = args.prompt + new_tokens(args.steps)
    pages = -(-length // config.page_size)
    return args, dataclasses.replace(
        config,
        max_total_tokens=config.max_total_tokens or args.batch * pages * config.page_size,
        context_length=config.context_length or length,
        max_running_requests=args.batch,
        max_queued_requests=args.batch,
    )


def main() -> None:
    args, config = parse_args()
    engine = Engine.load(config)
    memories = {"cpu", engine.config.device}
    seqs = prefill(engine, args.batch, args.prompt, new_tokens(args.steps))
    probe = partial(read_roof, nbytes=args.roof_mb << 20)
    before = {memory: probe(memory) for memory in memories}
    steps = decode(engine, seqs, args.steps)
    roofs = {memory: max(before[memory], probe(memory)) for memory in memories}
    rows = rows_of(engine, steps, roofs)
    facts = {
        "model": config.model,
        "device": engine.config.device,
        "method": engine.config.kt_method,
        "batch": args.batch,
        "prompt": args.prompt,
        "steps": args.steps,
        "threads": engine.config.kt_cpuinfer,
        "roof_gb_per_s": {memory: round(roof / GB, 1) for memory, roof in roofs.items()},
    }
    if args.json:
        print_json(rows, **facts)
    else:
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        print_table(rows, whole=rows[-1].timing.median)
        print(f"{args.batch / rows[-1].timing.median:.2f} tokens/s")
    engine.close()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bench_decode: {error}")
