"""How much the host reads of the experts' weights."""

import pytest
import torch

from hetero_glm5.experts import host_reads
from hetero_glm5.experts.host_reads import HostReads

IDS = torch.tensor([[3, -1], [0, 3], [-1, -1]])  # two experts


def test_each_expert_of_a_layer_counts_once(monkeypatch):
    clock = iter((1.0, 1.5, 4.0, 4.25, 6.0, 7.0)).__next__
    monkeypatch.setattr(host_reads.time, "perf_counter", clock)
    reads, y = HostReads(), torch.ones(3, 4)
    reads.begin(torch.tensor([True] * 3))
    assert reads.timed(IDS, 1000, lambda: y) is y
    reads.timed(IDS.int(), 1000, lambda: y)
    reads.end()
    assert (reads.bytes, reads.seconds, reads.gb_per_s) == (4000, 0.75, pytest.approx(4000 / 0.75 / 1e9))
    assert type(reads.bytes) is int, "JSON knows no other"
    reads.begin(torch.tensor([True, False]))
    reads.timed(IDS, 1000, lambda: y)
    reads.end()
    assert (reads.bytes, reads.seconds, reads.gb_per_s) == (6000, 1.75, pytest.approx(4000 / 0.75 / 1e9))
    reads.begin(torch.tensor([True]))
    reads.end()
    assert reads.gb_per_s is not None, "a step that reads nothing says nothing"
