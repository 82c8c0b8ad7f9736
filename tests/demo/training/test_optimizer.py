import pytest
import torch
from torch import nn

from hetero_glm5.demo.training.optimizer import Optimizer, Rates, orthogonal, schedule


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (3, 16, 16)])
def test_orthogonal(shape):
    singular = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))).float())
    assert singular.min() > 0.3 and singular.max() < 1.3


def test_the_rate_warms_up_stays_and_falls_to_zero():
    assert 0 < schedule(0, 1000) < 0.2
    assert schedule(20, 1000) == schedule(700, 1000) == 1
    falling = [schedule(done, 1000) for done in (700, 750, 900, 1000)]
    assert falling == sorted(falling, reverse=True) and falling[-1] == 0
    assert schedule(2000, 1000) == 0


def problem():
    torch.manual_seed(0)
    names = {"a.weight": (6, 4), "lm_head.weight": (5, 6), "norm.weight": (4,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in names.items()}


def test_the_loss_falls_and_kinds_of_parameters_are_told_apart():
    parameters = problem()
    optimizer = Optimizer(parameters, Rates(0.1, 0.1, 0.0))
    assert [name for name in parameters if optimizer.is_matrix(name)] == ["a.weight"]
    goal = torch.randn(5)

    def loss():
        a, head, norm = parameters.values()
        return (head @ (a @ norm) - goal).square().sum()

    before = loss().item()
    for _ in range(60):
        gradients = torch.autograd.grad(loss(), list(parameters.values()))
        optimizer.step(zip(parameters, gradients, strict=True), 0.3)
    assert loss().item() < 0.1 * before


def test_every_parameter_has_one_owner():
    parameters = problem()
    optimizer = Optimizer(parameters, Rates(0.1, 0.1))
    for count in (1, 2, 5):
        shares = optimizer.shares(count)
        assert sorted(name for share in shares for name in share) == sorted(parameters)
