"""Code for AMX runs here on machines without it, in processes of their own that preload an emulator."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hetero_glm5 import _C

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(name, *arguments) -> what the C++ compiler makes of them, as a file of that name. CXX names another compiler."""
    folder = tmp_path_factory.mktemp("compiled")

    def run(name: str, *arguments: str) -> Path:
        command = [os.environ.get("CXX", "c++"), *arguments, "-o", str(folder / name)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return folder / name

    return run


@pytest.fixture(scope="session")
def emulator(compiled: Callable[..., Path]) -> Path:
    """The library to preload."""
    if "amx" in _C.isas():
        pytest.skip("this machine has AMX: its kernels are tested like all others")
    if "avx512_bf16" not in _C.isas():
        pytest.skip("the ISA amx also needs AVX-512 with BF16, VBMI and VNNI")
    flags = ("-std=c++20", "-O3", "-mavx512f", "-shared", "-fPIC")
    return compiled("libamx.so", *flags, str(HERE / "amx_emulator.cpp"))
