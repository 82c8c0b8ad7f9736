from __future__ import annotations

from pathlib import Path

import cuda_standin
import pytest
import torch


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole run, so that `tiny_checkpoint(checkpoints, ...)` writes each model once."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """The models are tiny, and two OpenMP threads on two busy cores spend whole time slices waiting for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a CUDA runtime that needs no device."""
    return cuda_standin.build(tmp_path_factory.mktemp("cuda"))
