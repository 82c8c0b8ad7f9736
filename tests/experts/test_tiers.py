"""Both tiers together against the reference, however the experts are divided, the host part at once or on a stream."""

import numpy as np
import pytest
import torch
from cuda_standin import PatientStream

from hetero_glm5.core import Clock
from hetero_glm5.experts.cpu_tier import CpuExperts, HostPool
from hetero_glm5.experts.gpu_tier import GpuExperts
from hetero_glm5.experts.tiers import ExpertTiers, smallest
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


def test_deferred_experts_come_one_layer_later_but_for_the_last_layer():
    ids, weights = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])

    def contributions(layer):
        """y[t, e] = 100^layer · (weight of expert e): each layer's and expert's part can be told apart."""

        def host(x, ids, weights):
            y = torch.zeros(len(ids), EXPERTS)
            return y.scatter_add_(1, ids.clamp(min=0), torch.where(ids >= 0, 100**layer * weights, 0.0))

        return host

    device, on_host = GpuExperts(ExpertLayout("FP32", HIDDEN, WIDTH), 0, "cpu"), np.full((3, EXPERTS), -1)
    experts = ExpertTiers(range(3), {i: contributions(i) for i in range(3)}, device, on_host, stream=None)
    experts.deferred = 1
    now = torch.tensor([[0.5, 0, 0.3, 0, 0, 0], [0, 0, 0, 0, 0.6, 0.3]])
    late = torch.tensor([[0, 0.2, 0, 0, 0, 0], [0, 0, 0, 0.1, 0, 0]])
    for _ in range(2):  # a second step starts anew
        experts.begin_step(torch.ones(2, dtype=torch.bool))
        first, second, last = (experts(layer, torch.zeros(2, 6), ids, weights)() for layer in range(3))
        torch.testing.assert_close(first, now)
        torch.testing.assert_close(second, 100 * now + late)
        torch.testing.assert_close(last, 100**2 * (now + late) + 100 * late)


def test_deferral_takes_the_smallest_weights_of_the_host():
    ids = torch.tensor([[4, 1, -1, 3], [-1, -1, 2, -1], [-1, -1, -1, -1]])
    weights = torch.tensor([[0.4, 0.2, 0.1, 0.2], [0.1, 0.1, 0.9, 0.1], [0.1, 0.1, 0.1, 0.1]])
    assert smallest(ids, weights, 1).tolist() == [[False, True, False, False], [False, False, True, False], [False] * 4]
    assert smallest(ids, weights, 3).tolist() == [[True, True, False, True], [False, False, True, False], [False] * 4]
