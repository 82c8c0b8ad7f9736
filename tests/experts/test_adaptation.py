"""Experts that move while steps run, on a device that copies beside what it computes."""

import random

import numpy as np
import pytest
import torch
from standin_device import Line, StandinCopies, StandinMark, TaggedExperts

from hetero_glm5.experts.adaptation import Adaptation
from hetero_glm5.experts.counts import RoutingCounts
from hetero_glm5.experts.divided import DividedPrefill
from hetero_glm5.experts.mover import Mover
from hetero_glm5.experts.tiers import ExpertTiers
from hetero_glm5.placement.cost import Costs, Curve
from hetero_glm5.placement.planner import Adaptive, Static
from hetero_glm5.weights.quantize import ExpertLayout, PackedExperts

LAYERS, EXPERTS, TOPK, LAYOUT = 3, 8, 2, ExpertLayout("FP32", 4, 4)
# A host slow enough that fetches and streams pay, a link fast enough for several moves behind a step.
COSTS = Costs(LAYOUT.blob_bytes, Curve((1,), (3e-8,)), Curve((1,), (1e-10,)), link=1e8, host_call=0, device_call=0)


class Hesitant(Adaptive):
    MARGIN = 1.0  # leaves something to fetch


def tag(layer: int, expert: int) -> int:
    return layer * EXPERTS + expert


@pytest.fixture(scope="module")
def packed():
    layers = [PackedExperts(LAYOUT, EXPERTS) for _ in range(LAYERS)]
    for layer, experts in enumerate(layers):
        for expert in range(EXPERTS):
            experts.blob(expert).view(torch.int64)[:] = tag(layer, expert)
    return layers


class Rig:
    """Tiers over the stand-in; the host part is left out."""

    def __init__(self, packed, seed: int, *, slots: int = 6, most_delay: float = 2e-4, fail: float = 0.0, dynamic=True):
        self.compute = Line(seed, most_delay)
        self.lines = [StandinCopies(self.compute, seed + i, most_delay, fail * (i == 1)) for i in (1, 2, 3)]
        self.device = TaggedExperts(LAYOUT, slots, self.compute)
        slot_of = np.full(LAYERS * EXPERTS, -1)
        slot_of[np.random.default_rng(seed).permutation(LAYERS * EXPERTS)[:slots]] = np.arange(slots)
        slot_of = slot_of.reshape(LAYERS, EXPERTS)
        for layer, expert in np.argwhere(slot_of >= 0):
            self.device.slots[slot_of[layer, expert]] = packed[layer].blob(expert)
        self.tiers = ExpertTiers(range(LAYERS), {}, self.device, slot_of, stream=None)
        self.planner = Hesitant(slot_of, COSTS) if dynamic else Static(slot_of)
        background, urgent, streams = self.lines
        self.mover = Mover(packed, self.device.slots, background, urgent)
        self.tiers.adaptation = Adaptation(self.planner, RoutingCounts(LAYERS, EXPERTS, "cpu"), self.mover)
        self.tiers.divided = DividedPrefill(6, packed, self.device, streams, COSTS)
        self.tiers._start_host = lambda *call: lambda: torch.zeros(1)

    def steps(self, seed: int, count: int) -> None:
        choose = random.Random(seed)
        draw = torch.Generator().manual_seed(seed)
        topic = torch.rand(LAYERS, EXPERTS, generator=draw) ** 3
        for _ in range(count):
            if choose.random() < 0.1:
                topic = torch.rand(LAYERS, EXPERTS, generator=draw) ** 3
            rows = choose.choice((1, 2, 3, 8))
            self.tiers.begin_step(torch.ones(rows, dtype=torch.bool))
            for layer in range(LAYERS):
                ids = torch.multinomial(topic[layer].expand(rows, -1), TOPK, generator=draw)
                self.tiers(layer, torch.zeros(rows, 4), ids, (layer * EXPERTS + ids).float())
            if choose.random() < 0.7:
                self.compute.point().wait()  # as sampling does; else the device falls behind
            self.tiers.end_step()

    def close(self) -> None:
        self.compute.point().wait()
        for line in (*(copies.line for copies in self.lines), self.compute):
            line.close()


def run(packed, seed: int, count: int = 12, **options) -> Rig:
    rig = Rig(packed, seed, **options)
    rig.steps(seed, count)
    rig.close()
    return rig


def run_schedules(packed, seeds: range) -> None:
    seen, copied, routed = 0, np.zeros(3, dtype=int), np.zeros(2, dtype=int)
    for seed in seeds:
        rig = run(packed, seed, slots=1 + seed % 12)
        assert not rig.device.wrong, f"schedule {seed}"
        seen += rig.device.seen
        copied += [copies.count for copies in rig.lines]
        told = [size / LAYOUT.blob_bytes for size in rig.tiers.copied_bytes.values()]
        assert told == [copies.count for copies in rig.lines]
        routed += list(rig.tiers.adaptation.routed_to.values())
    assert (routed > len(seeds)).all()
    assert seen > 50 * len(seeds) and (copied > len(seeds) // 2).all()  # moves, fetches and streams all took place


def test_schedules(packed):
    run_schedules(packed, range(60))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 5000, 1000))
def test_a_thousand_schedules(packed, first):
    run_schedules(packed, range(first, first + 1000))


@pytest.mark.parametrize("order", [(StandinCopies, "after_compute"), (StandinMark, "hold")])
def test_a_lost_order_is_found_out(packed, monkeypatch, order):
    monkeypatch.setattr(*order, lambda self: None)
    assert any(run(packed, seed).device.wrong for seed in range(40))


def test_what_no_one_waits_for_is_found_out(packed, monkeypatch):
    monkeypatch.setattr(StandinMark, "passed", lambda self: True)
    assert any(run(packed, seed).device.wrong for seed in range(40))


def test_a_move_that_fails_leaves_its_expert_on_the_host(packed, caplog):
    failed = 0
    for seed in range(20):
        rig = run(packed, seed, fail=0.3)
        assert not rig.device.wrong
        failed += "the link is down" in caplog.text
        caplog.clear()
        held = rig.planner.slot_of[rig.planner.slot_of >= 0]
        assert len(set(held.tolist())) == len(held)
    assert failed > 10
