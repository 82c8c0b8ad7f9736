"""Which experts start on the device: pure functions from a budget (and counts) to a boolean [layers, experts]."""

from __future__ import annotations

import numpy as np

RANDOM_SEED = 42


def uniform(layers: int, experts: int, budget: int) -> np.ndarray:
    """The same number in each layer, the lowest ids; what does not divide goes to the first layers."""
    each, over = divmod(budget, layers) if layers else (0, 0)
    return np.arange(experts) < (each + (np.arange(layers) < over))[:, None]


def front_loading(layers: int, experts: int, budget: int) -> np.ndarray:
    """Whole layers from the first on."""
    return (np.arange(layers * experts) < budget).reshape(layers, experts)


def random(layers: int, experts: int, budget: int) -> np.ndarray:
    """Any experts of any layer, with a fixed seed."""
    return np.random.default_rng(RANDOM_SEED).permutation(layers * experts).reshape(layers, experts) < budget


def frequency(counts: np.ndarray, budget: int) -> np.ndarray:
    """The most often routed experts over all layers; counts [layers, experts], ties to the lower layer and id."""
    order = np.argsort(-counts, axis=None, kind="stable")
    chosen = np.zeros(counts.size, dtype=bool)
    chosen[order[:budget]] = True
    return chosen.reshape(counts.shape)


def place(strategy: str, layers: int, experts: int, budget: int, counts: np.ndarray | None = None) -> np.ndarray:
    """`strategy` by its --kt-expert-placement-strategy name; `budget` experts in all, at most layers·experts."""
    if strategy == "frequency":
        if counts is None:
            raise ValueError("frequency placement needs counts [layers, experts]")
        return frequency(counts, budget)
    by_name = {"uniform": uniform, "front-loading": front_loading, "random": random}
    return by_name[strategy](layers, experts, budget)


def slots(on_device: np.ndarray) -> np.ndarray:
    """slot_of int64 [layers, experts]: slots in layer order for the experts chosen, -1 for all others."""
    return np.where(on_device, np.cumsum(on_device).reshape(on_device.shape) - 1, -1)
