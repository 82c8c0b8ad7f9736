"""Both tiers together against the reference, however the experts are divided, the host part at once or on a stream."""

import numpy as np
import pytest
import torch
from cuda_standin import PatientStream

from hetero_glm5.core import Clock
from hetero_glm5.experts.cpu_tier import CpuExperts, HostPool
from hetero_glm5.experts.gpu_tier import GpuExperts
from hetero_glm5.experts.tiers import ExpertTiers
from hetero_glm5.ops import reference as ops
from hetero_glm5.weights.quantize import ExpertLayout, PackedExperts

EXPERTS, HIDDEN, WIDTH, TOPK, LAYER = 6, 40, 24, 3, 1
TOLERANCE = {"FP32": 1e-5, "BF16": 2e-2, "INT8": 2e-2, "INT4": 0.15}


@pytest.fixture(scope="module")
def pool():
    pool = HostPool(threads=2)
    yield pool
    pool.close()


@pytest.fixture(scope="module", params=["at once", "on a stream"])
def stream(request, standin):
    """What ExpertTiers takes: None, or a function of the device."""
    if request.param == "at once":
        yield None
        return
    stream = PatientStream(standin)
    yield lambda device: stream
    stream.destroy()


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = [
    (normal(WIDTH, HIDDEN, seed=e), normal(WIDTH, HIDDEN, seed=50 + e), normal(HIDDEN, WIDTH, seed=90 + e))
    for e in range(EXPERTS)
]


def tiers(pool, method, on_device, stream) -> ExpertTiers:
    layout = ExpertLayout(method, HIDDEN, WIDTH)
    slot_of = np.full((1, EXPERTS), -1)
    slot_of[0, on_device] = np.arange(len(on_device))
    device = GpuExperts(layout, len(on_device), "cpu")
    resident = [e for e in range(EXPERTS) if e not in on_device]
    packed = PackedExperts(layout, EXPERTS, resident)
    for e in range(EXPERTS):
        layout.pack_into(device.slots[slot_of[0, e]] if e in on_device else packed.blob(e), *WEIGHTS[e])
    host = {LAYER: CpuExperts(packed, pool=pool)} if resident else {}
    return ExpertTiers([LAYER], host, device, slot_of, stream=stream)


@pytest.mark.parametrize("method", TOLERANCE)
@pytest.mark.parametrize("on_device", [[], [4], [0, 2, 5], list(range(EXPERTS))])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_the_split_does_not_change_the_sum(pool, method, on_device, stream, rows):
    dtype = torch.float32 if method == "FP32" else torch.bfloat16
    x = normal(rows, HIDDEN, seed=7).to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(t))[:TOPK] for t in range(rows)])
    weights = normal(rows, TOPK, seed=8).abs()
    want = ops.experts(x.float(), ids, weights, lambda e: WEIGHTS[e])
    got = tiers(pool, method, on_device, stream)(LAYER, x, ids, weights)()
    assert got.dtype == torch.float32
    assert (got - want).norm() <= TOLERANCE[method] * want.norm()


def test_the_clock_tells_the_tiers_apart(pool, stream):
    x, ids, weights = normal(4, HIDDEN, seed=1), torch.tensor([[0, 1, 2]] * 4), torch.ones(4, 3)
    for on_device, parts in (([], {"host_experts"}), ([0, 1, 2], {"host_experts", "device_experts"})):
        clock = Clock()
        tiers(pool, "FP32", on_device, stream)(LAYER, x, ids, weights, clock)()
        assert set(clock.seconds) == parts and all(s > 0 for s in clock.seconds.values())


def test_an_error_in_the_host_part_reaches_the_caller(pool, stream):
    broken = tiers(pool, "FP32", [0], stream)
    broken.slot_of[0, 0] = -1  # claims that expert 0 is on the host, which holds no copy
    with pytest.raises(ValueError, match="expert 0"):
        y = broken(LAYER, normal(1, HIDDEN, seed=1), torch.tensor([[0, 1, 2]]), torch.ones(1, 3))()
        assert y.isnan().all()
        pool.check()
    pool.check()
