"""Muon for matrices, AdamW for the rest, over parameters that several processes share.

Muon (Jordan et al. 2024, with the update's size of Liu et al. 2025): momentum, then the nearest orthogonal matrix by
Newton-Schulz, times 0.2·sqrt(the longer side), so that an update is as large as Adam's. The matrices of all experts of
a layer are one batch. Each process owns some of the parameters and updates them for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

BETAS, EPS = (0.9, 0.95), 1e-10
MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic of Newton-Schulz: singular values end within 0.7 .. 1.2


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U·Vᵀ for each matrix U·S·Vᵀ of [..., m, n], computed in bf16."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def schedule(done: float, planned: float, *, warm_up: float = 0.01, decay: float = 0.3) -> float:
    """Warm up, stay, decay: the factor on the learning rate after `done` of `planned` tokens. It falls to 0 as
    1 - sqrt(share of the decay done)."""
    share = min(1.0, done / planned)
    if share < warm_up:
        return (share + 1e-3) / (warm_up + 1e-3)
    return 1.0 if share <= 1 - decay else 1 - math.sqrt((share - 1 + decay) / decay)


@dataclass
class Rates:
    """Learning rates of matrices (Muon) and of embeddings, head and vectors (Adam)."""

    matrix: float
    table: float
    weight_decay: float = 0.1  # of matrices, per unit of learning rate

    def changed(self, matrix: float, table: float) -> Rates:
        """With other rates where one is given (not 0)."""
        return Rates(matrix or self.matrix, table or self.table, self.weight_decay)


@dataclass
class Optimizer:
    parameters: dict[str, nn.Parameter]
    rates: Rates
    state: dict[str, Tensor] = field(default_factory=dict)  # "NAME.momentum" and, for Adam, "NAME.square"
    steps: int = 0

    def __post_init__(self) -> None:
        for name, parameter in self.parameters.items():
            for kind in ("momentum",) if self.is_matrix(name) else ("momentum", "square"):
                self.state.setdefault(f"{name}.{kind}", torch.zeros_like(parameter).share_memory_())

    def is_matrix(self, name: str) -> bool:
        return self.parameters[name].dim() > 1 and "embed_tokens" not in name and "lm_head" not in name

    def shares(self, count: int) -> list[list[str]]:
        """The names each of `count` processes updates, by about equal work."""
        shares: list[list[str]] = [[] for _ in range(count)]
        work = [0.0] * count
        for name in sorted(self.parameters, key=self._cost, reverse=True):
            least = work.index(min(work))
            shares[least].append(name)
            work[least] += self._cost(name)
        return shares

    def _cost(self, name: str) -> float:
        parameter = self.parameters[name]
        return parameter.numel() * (1 + (min(parameter.shape[-2:]) / 4 if self.is_matrix(name) else 0))

    @torch.no_grad()
    def step(self, gradients: Iterable[tuple[str, Tensor]], factor: float) -> None:
        """Updates the named parameters in place; `factor` scales the learning rates."""
        self.steps += 1
        for name, gradient in gradients:
            parameter, momentum = self.parameters[name], self.state[f"{name}.momentum"]
            if self.is_matrix(name):
                rate = self.rates.matrix * factor
                momentum.mul_(MOMENTUM).add_(gradient)
                update = orthogonal(gradient + MOMENTUM * momentum)
                parameter.mul_(1 - rate * self.rates.weight_decay)
                parameter.add_(update, alpha=-rate * 0.2 * math.sqrt(max(parameter.shape[-2:])))
            else:
                square = self.state[f"{name}.square"]
                momentum.lerp_(gradient, 1 - BETAS[0])
                square.lerp_(gradient.square(), 1 - BETAS[1])
                spread = (square / (1 - BETAS[1] ** self.steps)).sqrt_().add_(EPS)
                rate = self.rates.table * factor / (1 - BETAS[0] ** self.steps)
                parameter.addcdiv_(momentum, spread, value=-rate)
