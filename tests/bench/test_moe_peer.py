from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_case import MoeCase
from moe_peer import TimedLayer, TorchLoop, quantize_blocks, quantize_nibbles, quantize_rows

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "moe_peer.py"
CASE = MoeCase(hidden=128, intermediate=128, experts=6, topk=2)


@pytest.mark.parametrize(("method", "bound"), [("FP32", 1e-5), ("BF16", 0.01)])
def test_torch_loop_is_the_layer(method, bound):
    layer = TimedLayer(CASE, TorchLoop(CASE, method, threads=1))
    assert layer.error(4) < bound and layer.error(1) < bound
    assert layer.seconds(8, draw=1) > 0


@pytest.mark.parametrize(("quantise", "bound"), [(quantize_blocks, 0.04), (quantize_rows, 0.01)])
def test_quantisers(quantise, bound):
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    codes, scales = quantise(weight)
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert float((codes.float() * scales - weight).norm() / weight.norm()) < bound


def test_nibbles():
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    words, scales = quantize_nibbles(weight, group=64)
    assert words.shape == (32, 32) and words.dtype == torch.int32 and scales.shape == (32, 4)
    codes = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1).view(32, 256) - 8
    stored = codes * scales.float().repeat_interleave(64, 1)
    assert float((stored - weight).norm() / weight.norm()) < 0.13


def ask(name, *requests):
    facts = {"case": {"hidden": 128, "intermediate": 128, "experts": 6, "topk": 2}, "method": "BF16", "threads": 1}
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    command = [sys.executable, str(SCRIPT), name, json.dumps(facts)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_process_answers_line_by_line():
    ready, error, seconds = ask("torch", {"rows": 2, "error": True}, {"rows": 2, "draw": 1})
    assert ready == {"ready": True} and error["error"] < 0.01 and seconds["seconds"] > 0


def test_a_peer_that_is_not_installed_refuses_in_a_line():
    (answer,) = ask("vllm-cpu")
    assert "ready" in answer or "vllm" in answer["refused"]
