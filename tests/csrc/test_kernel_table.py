"""Choosing an ISA, and the guard that keeps code of one ISA out of the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hetero_glm5 import _C
from hetero_glm5.experts.cpu_tier import HostPool

ISA_CMAKE = Path(__file__).parents[2] / "cmake" / "isa.cmake"


def selected(isa: str) -> subprocess.CompletedProcess:
    code = "from hetero_glm5 import _C; print(_C.selected_isa())"
    environment = {**os.environ, "HETERO_GLM5_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


ORDER = ["amx", "avx512_bf16", "avx512", "avx2", "scalar"]


def test_best_first_and_scalar_everywhere():
    assert _C.isas() == [isa for isa in ORDER if isa in _C.isas()]
    assert _C.isas()[-1] == "scalar"


def test_the_environment_forces_one():
    assert selected("scalar").stdout.strip() == "scalar"
    assert selected("").stdout.strip() == _C.isas()[0]
    for absent in ["avx9000", *(isa for isa in ORDER[:1] if isa not in _C.isas())]:
        refused = selected(absent)
        assert refused.returncode != 0
        assert f"ISA '{absent}' is not present on this machine; present: {', '.join(_C.isas())}" in refused.stderr


@pytest.mark.parametrize("isa", _C.isas())
def test_a_pool_runs_what_it_is_told(isa):
    assert HostPool(1, isa).isa == isa


TABLE = "extern const int kernel_table_x; const int kernel_table_x = 1;"


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        (TABLE + "static int f() { return 2; } static int g = f();", True),
        (TABLE + "inline int shared() { return 1; } int (*volatile keep)() = shared;", False),
        (TABLE + "struct S { int member() { return 1; } }; static int g = S().member();", False),
        (TABLE + "int visible() { return 1; }", False),
        ("inline int kernel_table_x() { return 1; } static int g = kernel_table_x();", False),
    ],
)
def test_guard(tmp_path, source, passes):
    unit, obj = tmp_path / "unit.cpp", tmp_path / "unit.o"
    unit.write_text(source)
    subprocess.run(["c++", "-c", "-O0", str(unit), "-o", str(obj)], check=True)
    guard = ["cmake", "-DNM=nm", f"-DOBJECT={obj}", f"-DSTAMP={tmp_path / 'stamp'}", "-P", str(ISA_CMAKE)]
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]  # cmake may be a Python package
    result = subprocess.run(guard, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert (result.returncode == 0) == passes, result.stderr
    assert passes or "must not be visible" in " ".join(result.stderr.split())
