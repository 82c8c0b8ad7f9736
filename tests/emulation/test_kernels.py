"""The kernels of the ISA amx, under emulation: the tests of the host operator, and a count of what they ran."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def passed(emulator: Path, *arguments: str) -> int:
    """How many tests pass in a process with the emulator, where none may fail."""
    # faulthandler would take SIGILL
    command = [sys.executable, "-m", "pytest", "-p", "no:faulthandler", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "LD_PRELOAD": str(emulator)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    found = re.search(r"(\d+) passed", result.stdout)
    return int(found[1]) if found else 0


def test_the_host_operator(emulator):
    assert passed(emulator, "tests/experts/test_cpu_tier.py", "-k", "amx or same_bits") > 50


def test_tiles_do_the_work(emulator):
    assert passed(emulator, str(HERE / "instruction_counts.py")) > 20


@pytest.mark.slow
def test_many_rows(emulator):
    assert passed(emulator, "tests/experts/test_cpu_tier.py", "-m", "slow", "-k", "amx") == 5


@pytest.mark.slow
def test_the_engine(emulator):
    assert passed(emulator, "tests/e2e/test_invariance.py", "-k", "test_isa and amx") == 1
