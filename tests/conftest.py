from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the whole run, so that `tiny_checkpoint(checkpoints, ...)` writes each model once."""
    return tmp_path_factory.mktemp("checkpoints")
