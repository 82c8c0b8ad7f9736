"""Measures what experts cost on this machine, with the kernels that serve: a placement.profile.Profile.

A call gives some experts the same number of tokens each. Calls take turns with more experts than a cache holds, so that
weights are read from memory, and each follows a small one, so that the threads are awake as in the middle of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hetero_glm5 import __version__, hardware
from hetero_glm5.experts.cpu_tier import CpuExperts, HostPool
from hetero_glm5.experts.gpu_tier import GpuExperts
from hetero_glm5.experts.host_stream import CudaStream
from hetero_glm5.placement.cost import Costs, Curve
from hetero_glm5.placement.profile import Profile
from hetero_glm5.weights.quantize import ExpertLayout, PackedExperts, quantize_fp8

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ALWAYS = 64  # tokens up to which a curve goes whatever the time; it is proportional after its last
CALLS = 5  # measured for each point; their median counts
COLD_BYTES = 1 << 30  # of experts
MEMORY_SHARE = 0.3  # of the memory that is free, at most, for them
LINK_BYTES = 64 << 20
HAND_OVERS = 200
QUICK_SECONDS = 5.0


class Shape(NamedTuple):
    """Of an expert: GLM-5's."""

    hidden: int = 6144
    intermediate: int = 2048


class Layer(Protocol):
    """x [T, hidden], ids [T, k], weights [T, k] -> y [T, hidden]."""

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, /) -> Tensor: ...


def costs_here(profile: Path | None, layout: ExpertLayout, threads: int = 0, nodes: Sequence[int] = ()) -> Costs:
    """Of a model's experts: from a profile, or from some seconds of measuring if there is none. UserError if the
    profile cannot be read, or was measured without a device or the format."""
    if profile is not None:
        return Profile.load(profile).costs(layout.method, layout.blob_bytes)
    shape = Shape(layout.hidden, layout.intermediate)
    measured = calibrate([layout.method], threads=threads, nodes=nodes, seconds=QUICK_SECONDS, shape=shape)
    return measured.costs(layout.method, layout.blob_bytes)


def calibrate(
    methods: Sequence[str],
    *,
    threads: int = 0,
    nodes: Sequence[int] | None = None,
    seconds: float = 60.0,
    shape: Shape = Shape(),  # noqa: B008, cannot change
    tell: Callable[[str], None] = lambda doing: None,
) -> Profile:
    """Curves of weight formats on the host, and on the device where there is one, in about `seconds`. threads, nodes:
    as HostPool has them; nodes None = all, if there are several."""
    machine = hardware.probe(gpu=True)
    if nodes is None:
        nodes = tuple(machine.numa) if len(machine.numa) > 1 else ()
    pool = HostPool(threads, nodes=nodes)
    host: dict[str, Curve] = {}
    device: dict[str, Curve] = {}
    turn = seconds / (len(methods) * (2 if machine.cuda else 1))
    try:
        for method in methods:
            layout = ExpertLayout(method, *shape)
            tell(f"{method} on the host")
            host[method] = host_curve(layout, pool, turn)
            if machine.cuda:
                tell(f"{method} on {machine.gpu}")
                device[method] = device_curve(layout, "cuda", turn)
        host_call = host_call_seconds(pool, "cuda" if machine.cuda else "cpu")
    finally:
        pool.close()
    link = link_bandwidth("cuda") if machine.cuda else None
    versions = {"hetero_glm5": __version__, "torch": torch.__version__}
    return Profile(machine.cpu, pool.isa, pool.threads, machine.gpu, versions, host, device, link, host_call)


def host_curve(layout: ExpertLayout, pool: HostPool, seconds: float) -> Curve:
    started = time.perf_counter()
    count = _cold_count(layout, hardware.probe(gpu=False).ram_available)
    packed, blob = PackedExperts(layout, count, nodes=pool.nodes), random_blob(layout)
    for expert in range(count):
        with packed.filling(expert) as memory:
            memory.copy_(blob)
    left = seconds - (time.perf_counter() - started)
    return _curve(CpuExperts(packed, pool=pool), layout, count, left, torch.device("cpu"))


def device_curve(layout: ExpertLayout, device: str, seconds: float) -> Curve:
    """Of the device tier's experts on any torch device."""
    started = time.perf_counter()
    machine = hardware.probe(gpu=device == "cuda")
    count = _cold_count(layout, machine.gpu_free if machine.cuda else machine.ram_available)
    tier = GpuExperts(layout, count, device)
    tier.slots[:] = random_blob(layout).to(device)
    left = seconds - (time.perf_counter() - started)
    return _curve(tier, layout, count, left, tier.slots.device)


def host_call_seconds(pool: HostPool, device: str) -> float:
    """Of a call with next to no work, for rows on that torch device."""
    experts = CpuExperts(PackedExperts(ExpertLayout("BF16", 256, 256), 1, nodes=pool.nodes), pool=pool)
    x = torch.zeros((1, 256), dtype=torch.bfloat16, device=device)
    ids, weights = torch.zeros((1, 1), dtype=torch.int64, device=device), torch.ones((1, 1), device=device)

    def call() -> Tensor:
        if x.is_cuda:
            return experts.start(CudaStream(x.device), x, ids, weights)()
        return experts(x, ids, weights)

    return float(np.median([_seconds(call, x.device) for _ in range(HAND_OVERS)]))


def link_bandwidth(device: str) -> float:
    """Bytes per second from pinned memory to that torch device."""
    source = torch.ones(LINK_BYTES, dtype=torch.uint8, pin_memory=device == "cuda")
    target = torch.empty_like(source, device=device)
    copies = [_seconds(lambda: target.copy_(source, non_blocking=True), target.device) for _ in range(2 * CALLS)]
    return LINK_BYTES / float(np.median(copies))


def random_blob(layout: ExpertLayout) -> Tensor:
    """One packed expert of random weights."""
    generator = torch.Generator().manual_seed(0)
    packed = PackedExperts(layout, 1)
    shapes = ((layout.intermediate, layout.hidden),) * 2 + ((layout.hidden, layout.intermediate),)
    parts = [torch.randn(shape, generator=generator) * 0.02 for shape in shapes]
    if layout.method == "FP8":
        codes, scales = zip(*map(quantize_fp8, parts), strict=True)
        packed.set(0, *codes, scales=scales)
    else:
        packed.set(0, *parts)
    return packed.blob(0)


def _cold_count(layout: ExpertLayout, free: int) -> int:
    return max(1, min(COLD_BYTES, int(free * MEMORY_SHARE)) // layout.blob_bytes)


def _curve(layer: Layer, layout: ExpertLayout, count: int, seconds: float, device: torch.device) -> Curve:
    """`layer` has `count` experts. Each point gets the same part of the time that is left, with as many experts to a
    call as that allows."""
    deadline, turns = time.perf_counter() + seconds, cycle(range(count))

    def call(tokens: int, experts: int) -> float:
        waking, *wanted = islice(turns, 1 + experts)
        ids = torch.tensor([wanted], device=device).repeat(tokens, 1)
        x = torch.randn((tokens, layout.hidden), device=device).bfloat16()
        weights = torch.ones(ids.shape, device=device)
        layer(x[:1], torch.tensor([[waking]], device=device), weights[:1, :1])
        return _seconds(lambda: layer(x, ids, weights), device) / experts

    call(1, 1)  # warms up
    each, points = call(1, 1), []
    for i, tokens in enumerate(TOKENS):
        if points:
            each = points[-1] * tokens / TOKENS[i - 1]  # at most
        turn = (deadline - time.perf_counter()) / (len(TOKENS) - i) / CALLS
        if tokens > ALWAYS and each > turn:
            break
        experts = int(np.clip(turn / each, 1, count))
        points.append(float(np.median([call(tokens, experts) for _ in range(CALLS)])))
    rising = np.maximum.accumulate(points) / layout.blob_bytes  # more tokens take no less; what falls is noise
    return Curve(tuple(map(float, TOKENS[: len(points)])), tuple(rising.tolist()))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, with all that it asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
