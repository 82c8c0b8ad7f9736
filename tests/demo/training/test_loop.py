import json
import re

import pytest
import torch
from training import toy_plan, write_toy_data

from hetero_glm5.core import UserError
from hetero_glm5.demo.training.loop import Shared, Worker, checkpoint_path, run


def trained(folder, stage="dense"):
    return torch.load(checkpoint_path(folder, stage), weights_only=True)["model"]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_that_is_stopped_goes_on_to_the_same_parameters(tmp_path):
    once, often = tmp_path / "once", tmp_path / "often"
    for folder in (once, often):
        write_toy_data(folder, documents=50)
    run(toy_plan(once, steps=4))
    steps = [(line["step"], line["file"], line["length"]) for line in log(once)]
    for _ in steps:
        run(toy_plan(often, steps=4, minutes=0))  # one step
    assert [(line["step"], line["file"], line["length"]) for line in log(often)] == steps
    assert {length for _, _, length in steps} == {256, 512} and len({file for _, file, _ in steps}) > 1
    for name, tensor in trained(once).items():
        assert torch.equal(tensor, trained(often)[name]), name


def test_the_loss_falls(tmp_path):
    write_toy_data(tmp_path)
    run(toy_plan(tmp_path, steps=20, eval_every=10))
    losses = [sum(line["loss"].values()) / len(line["loss"]) for line in log(tmp_path) if "loss" in line]
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]
    held_out = next(line["held_out"] for line in reversed(log(tmp_path)) if "held_out" in line)
    assert max(held_out.values()) < 0.9 * losses[0]


def test_biases_move_the_loads_together(tmp_path):
    write_toy_data(tmp_path, documents=300)
    plan = toy_plan(tmp_path, balance=0.01, matrix_rate=1e-9, table_rate=1e-9, steps=200, length=2048)
    worker, loads = Worker(0, Shared(plan), plan, None), []
    for _ in range(30):
        worker.step()
        loads.append(worker.shared.loads[0].clone())
    first, last = (sum(part).std(1) for part in (loads[:8], loads[-8:]))
    assert (last < 0.7 * first).all(), (first, last)


def test_all_stages_train_what_they_should(tmp_path):
    write_toy_data(tmp_path)
    run(toy_plan(tmp_path, steps=2))
    before = trained(tmp_path)
    for stage, own in {"indexer": r"trunk\..*\.indexer\.", "sparse": r"trunk\.", "mtp": r"mtp\."}.items():
        run(toy_plan(tmp_path, stage, steps=3))
        after = trained(tmp_path, stage)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed == {name for name in after if re.match(own, name)}, stage
        before = after


def test_a_stage_needs_the_one_before(tmp_path):
    write_toy_data(tmp_path)
    with pytest.raises(UserError, match="train dense first"):
        run(toy_plan(tmp_path, "indexer"))


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write_toy_data(folder)
    run(toy_plan(one, steps=6, batches=2))
    run(toy_plan(two, steps=6, workers=2))
    for name, tensor in trained(one).items():
        assert torch.allclose(tensor, trained(two)[name], atol=2e-3), name
    assert [line["file"] for line in log(one)] == [line["file"] for line in log(two)]
