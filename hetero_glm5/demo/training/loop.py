"""The training loop: processes that share the parameters, each with its own batches and one thread.

One thread a process, because small products gain little from a second one. A step: each process adds up the gradients
of its batches; each then updates its share of the parameters from everybody's gradients. The same command continues
from the last checkpoint, and ends with the same parameters as if it had never been stopped.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from hetero_glm5.core import UserError
from hetero_glm5.demo.corpus import KINDS
from hetero_glm5.demo.training.data import Stream
from hetero_glm5.demo.training.model import Demo
from hetero_glm5.demo.training.optimizer import Optimizer, schedule
from hetero_glm5.demo.training.stages import INDEXER_SHARE, STAGES, Scored, Watch

CLIP = 1.0
NAMES = (*KINDS, *(f"{kind} prompt" for kind in KINDS), "indexer")


@dataclass(frozen=True)
class Plan:
    out: Path
    config: dict[str, Any]
    stage: str
    tokens: int  # planned: the learning rate is a function of the share of them that is done
    minutes: float = 1e9  # of this run; it stops with a checkpoint
    workers: int = 2
    length: int = 8192  # tokens in a batch, at most
    batches: int = 1  # of each worker in a step
    files: int = 1  # of training data
    seed: int = 0
    balance: float = 2e-3  # step of the routers' biases
    save_seconds: float = 120
    log_every: int = 20
    eval_every: int = 200
    compiled: bool = True
    matrix_rate: float = 0  # 0: the stage's
    table_rate: float = 0


@dataclass
class Progress:
    step: int = 0
    tokens: int = 0
    file: int = 0
    batch: int = 0
    length: int = 0  # of batches; set, as the limits of documents' lengths are, when a file is opened
    limits: tuple[int, int] = (0, 0)
    seconds: float = 0.0


class Shared:
    """What the processes share: parameters and optimizer state, gradients, sums of what is logged."""

    def __init__(self, plan: Plan):
        stage, self.progress = STAGES[plan.stage], Progress()
        self.demo = Demo(plan.config, plan.seed)
        saved = None
        for name in (stage.name, stage.before):
            path = checkpoint_path(plan.out, name) if name else None
            if path and path.exists():
                saved = torch.load(path, weights_only=True, mmap=True)
                self.demo.load_state_dict(saved["model"])
                break
        else:
            if stage.before:
                raise UserError(f"{checkpoint_path(plan.out, stage.before)} is missing; train {stage.before} first.")
        self.demo.share_memory()
        rates = stage.rates.changed(plan.matrix_rate, plan.table_rate)
        self.optimizer = Optimizer(stage.parameters(self.demo), rates)
        if saved and saved["stage"] == stage.name:
            for name, tensor in saved["optimizer"].items():
                self.optimizer.state[name].copy_(tensor)
            self.progress = Progress(**saved["progress"])
            self.optimizer.steps = self.progress.step
        total = sum(p.numel() for p in self.optimizer.parameters.values())
        gates, experts = stage.gates(self.demo), plan.config["n_routed_experts"]
        self.gradients = torch.zeros(plan.workers, total).share_memory_()
        self.losses = torch.zeros(plan.workers, len(NAMES), 2, dtype=torch.float64).share_memory_()
        self.loads = torch.zeros(plan.workers, len(gates), experts).share_memory_()
        self.squares = torch.zeros(plan.workers).share_memory_()
        self.stop = torch.zeros(1).share_memory_()


def checkpoint_path(out: Path, stage: str) -> Path:
    return out / f"{stage}.pt"


def run(plan: Plan) -> bool:
    """Trains one stage until its planned tokens are done (True) or the minutes are over (False)."""
    shared = Shared(plan)
    if shared.progress.tokens >= plan.tokens:
        return True
    if plan.workers == 1:
        Worker(0, shared, plan, None).train()
    else:
        barrier = mp.get_context("spawn").Barrier(plan.workers)
        mp.spawn(_work, (shared, plan, barrier), nprocs=plan.workers)
    return not shared.stop.item()


def _work(rank: int, shared: Shared, plan: Plan, barrier: Any) -> None:
    torch.set_num_threads(1)
    Worker(rank, shared, plan, barrier).train()


class Worker:
    def __init__(self, rank: int, shared: Shared, plan: Plan, barrier: Any):
        self.rank, self.shared, self.plan, self.barrier = rank, shared, plan, barrier
        kind = STAGES[plan.stage]
        self.stage = kind(shared.demo, compiled=plan.compiled)
        self.gates = kind.gates(shared.demo)
        self.optimizer, self.progress = shared.optimizer, shared.progress
        self.stream = Stream(plan.out, "train", plan.files)
        self.held_out = Stream(plan.out, "held-out", 1)
        self.slices, start = {}, 0
        for parameter in shared.demo.parameters():
            parameter.requires_grad_(False)
        for name, parameter in self.optimizer.parameters.items():
            parameter.requires_grad_(True)
            self.slices[name] = slice(start, start + parameter.numel())
            start += parameter.numel()
            parameter.grad = shared.gradients[rank, self.slices[name]].view_as(parameter)
        self.own = self.optimizer.shares(plan.workers)[rank]
        self.begun, self.spent = time.monotonic(), self.progress.seconds
        self.saved = self.logged = self.begun
        self.sums, self.since = torch.zeros_like(shared.losses[0]), self.progress.tokens

    def train(self) -> None:
        while self.progress.tokens < self.plan.tokens and not self.shared.stop.item():
            self.step()
        if self.rank == 0:
            self.save()

    def step(self) -> None:
        """One update of the parameters. Between two `meet`s nobody writes what another reads."""
        shared, progress = self.shared, self.progress
        self.gradients()
        self.meet()
        factor = schedule(progress.tokens, self.plan.tokens)
        gradients = [(name, self.gradient(name)) for name in self.own]
        shared.squares[self.rank] = sum(g.square().sum() for _, g in gradients)
        self.meet()
        norm = shared.squares.sum().sqrt().item()
        scale = min(1.0, CLIP / (norm + 1e-6))
        self.optimizer.step(((name, g * scale) for name, g in gradients), factor)
        progress.step += 1
        progress.tokens += self.plan.workers * self.plan.batches * progress.length
        if self.rank == 0:
            self.balance()
            self.account(factor, norm)
        self.meet()
        if self.rank == 0 and time.monotonic() - self.saved > self.plan.save_seconds:
            self.save()
        if progress.step % self.plan.eval_every == 0 or progress.tokens >= self.plan.tokens:
            self.evaluate()

    def meet(self) -> None:
        if self.barrier is not None:
            self.barrier.wait()

    def gradients(self) -> None:
        """Of this process's batches, into its row of the shared buffer; the place of the next step's batches."""
        plan, progress = self.plan, self.progress
        group = plan.workers * plan.batches
        if progress.batch + group > self.stream.open(progress.file, progress.length, progress.limits):
            progress.file, progress.batch = progress.file + (progress.step > 0), 0
            share, *limits = self.stage.documents(progress.tokens / plan.tokens)
            progress.length, progress.limits = int(share * plan.length), tuple(limits)
            if self.stream.open(progress.file, progress.length, progress.limits) < group:
                raise UserError(f"File {progress.file} of {plan.out} has no {group} batches of such documents.")
        self.shared.gradients[self.rank].zero_()
        self.shared.losses[self.rank].zero_()
        self.shared.loads[self.rank].zero_()
        for i in range(plan.batches):
            batch = self.stream.batch(progress.batch + i * plan.workers + self.rank)
            watch = self.stage.watch()
            watch.scale = INDEXER_SHARE / group / progress.length
            scored = self.stage.loss(batch, watch)
            if scored.loss is not None:
                (scored.loss / group).backward()
            self.add_losses(scored, watch)
            self.shared.loads[self.rank] += watch.counts
        progress.batch += group

    def add_losses(self, scored: Scored, watch: Watch) -> None:
        real = (scored.weights > 0).double()
        sums = self.shared.losses[self.rank]
        sums[:, 0].index_add_(0, scored.kinds, scored.each.double() * real)
        sums[:, 1].index_add_(0, scored.kinds, real)
        sums[-1] += torch.tensor(watch.divergence())

    def gradient(self, name: str) -> Tensor:
        total = self.shared.gradients[:, self.slices[name]].sum(0)
        return total.view_as(self.optimizer.parameters[name])

    @torch.no_grad()
    def balance(self) -> None:
        """Without an auxiliary loss: an expert with less than the mean load gets a higher bias."""
        loads = self.shared.loads.sum(0)
        for gate, load in zip(self.gates, loads, strict=True):
            gate.e_score_correction_bias += self.plan.balance * torch.sign(load.mean() - load)

    def account(self, factor: float, norm: float) -> None:
        """What rank 0 logs and decides after a step."""
        progress, now = self.progress, time.monotonic()
        progress.seconds = self.spent + now - self.begun
        self.sums += self.shared.losses.sum(0)
        if now - self.begun > 60 * self.plan.minutes and progress.tokens < self.plan.tokens:
            self.shared.stop[0] = 1
        if progress.step % self.plan.log_every == 0:
            loads = self.shared.loads.sum(0)
            self.log(
                lr=round(factor, 4),
                norm=round(norm, 3),
                imbalance=[round(x, 2) for x in (loads.amax(1) / loads.mean(1)).tolist()],
                rate=round((progress.tokens - self.since) / (now - self.logged)),
                loss=means(self.sums),
            )
            self.sums.zero_()
            self.logged, self.since = now, progress.tokens

    def log(self, **entries: Any) -> None:
        progress = asdict(self.progress) | {"seconds": round(self.progress.seconds, 1)}
        line = json.dumps({"stage": self.plan.stage, **progress, **entries})
        with open(self.plan.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    @torch.no_grad()
    def evaluate(self, most: int = 16) -> None:
        """Mean loss of each kind on held-out documents."""
        self.meet()
        self.shared.losses[self.rank].zero_()
        count = self.held_out.open(0, self.plan.length, (0, self.plan.length))
        for index in range(self.rank, min(most, count), self.plan.workers):
            watch = self.stage.watch()
            self.add_losses(self.stage.loss(self.held_out.batch(index), watch), watch)
        self.meet()
        if self.rank == 0:
            self.log(held_out=means(self.shared.losses.sum(0)))
        self.meet()

    def save(self) -> None:
        path = checkpoint_path(self.plan.out, self.plan.stage)
        temporary = path.with_suffix(".tmp")
        torch.save(
            {
                "stage": self.plan.stage,
                "model": self.shared.demo.state_dict(),
                "optimizer": self.optimizer.state,
                "progress": asdict(self.progress),
            },
            temporary,
        )
        os.replace(temporary, path)
        self.saved = time.monotonic()


def means(sums: Tensor) -> dict[str, float]:
    return {name: round((s / n).item(), 4) for name, (s, n) in zip(NAMES, sums, strict=True) if n > 0}
