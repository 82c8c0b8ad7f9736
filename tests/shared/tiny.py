"""The small random model that tests share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.demo.random_checkpoint import write_checkpoint


def tiny_checkpoint(root: Path, *, seed: int = 0, dtype: str = "float32", fp8: bool = False, **overrides: Any) -> Path:
    """A checkpoint of tiny_config(**overrides) below `root`, written once for each set of arguments.

    Give the session's `checkpoints` folder (a fixture) as `root` to share it among tests.
    """
    key = json.dumps([seed, dtype, fp8, overrides], sort_keys=True)
    folder = root / f"tiny-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not folder.exists():
        write_checkpoint(folder, tiny_config(**overrides), seed=seed, dtype=dtype, fp8=fp8)
    return folder
