"""The C++ code under the thread sanitizer, and under the address and undefined-behaviour sanitizers.

The extension is built with them in a temporary folder, beside a copy of the package, and the tests that drive it run
again on that copy, in a process of its own. Any report fails, and bugs planted in these builds show that reports are
seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pybind11
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("csrc", "experts", "model/test_few_rows.py", "weights/test_quantize.py", "weights/test_integers.py")
# A limit on address space leaves no room for a sanitizer's own memory, and its malloc is not the one a test counts; the
# others take minutes and add nothing.
CHOSEN = (
    "not threads_that_cannot_be_started and not calls_do_not_allocate and not error_of_a_layer "
    "and not (a_row_depends and (scalar or avx2)) and not (packing_is_the_quantiser and (INT4-64 or INT4-128))"
)

# gcc 12's libtsan does not start where addresses are too random (vm.mmap_rnd_bits above 28).
STILL = ["setarch", "-R"] if subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0 else []


@dataclass(frozen=True)
class Build:
    """What runs sanitized code: a folder with the package, and the environment that loads the sanitizer first."""

    site: Path
    environment: dict[str, str]

    def run(self, *arguments: str, timeout: int = 60) -> str:
        """Runs Python -> its output, its exit code, and the reports; but those of undefined behaviour are in its output
        and end it."""
        reports = self.site / "reports"
        shutil.rmtree(reports, ignore_errors=True)
        reports.mkdir()
        options = {"cwd": self.site, "env": self.environment, "text": True, "capture_output": True}
        done = subprocess.run([*STILL, sys.executable, *arguments], timeout=timeout, **options)
        found = "".join(file.read_text(errors="replace") for file in sorted(reports.iterdir()))
        return f"{done.stdout}{done.stderr}exit code {done.returncode}\nreports:\n{found}"


LIBRARIES = {"thread": ["libtsan.so"], "address": ["libasan.so", "libstdc++.so"]}  # asan wants to see __cxa_throw


@pytest.fixture(scope="module", params=LIBRARIES)
def build(request, tmp_path_factory) -> Build:
    folder, site = (tmp_path_factory.mktemp(f"{request.param}_{part}") for part in ("build", "site"))
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]  # cmake may be a Python package
    cmake = shutil.which("cmake", path=path) or "cmake"
    facts = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure = [cmake, f"-S{ROOT}", f"-B{folder}", "-GNinja", f"-DHETERO_GLM5_SANITIZE={request.param}", *facts]
    for command in (configure, [cmake, "--build", str(folder)]):
        subprocess.run(command, check=True, env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL)

    package = site / "hetero_glm5"
    shutil.copytree(ROOT / "hetero_glm5", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (extension,) = folder.glob("_C.*.so")
    shutil.copy2(extension, package)
    options = f"log_path={site}/reports/report:detect_leaks=0:print_stacktrace=1"
    environment = {
        "PATH": path,
        "PYTHONPATH": str(site),
        "LD_PRELOAD": " ".join(runtime_library(name) for name in LIBRARIES[request.param]),
        "TSAN_OPTIONS": f"log_path={site}/reports/report",
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": options,
        "CXXFLAGS": f"-fsanitize={request.param}",  # of the tests' own libraries
        "TOKENIZERS_PARALLELISM": "false",  # what its threads do is not seen, and looks like races
    }
    return Build(site, os.environ | environment)


def runtime_library(name: str) -> str:
    command = [shutil.which("c++") or "g++", f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{command[0]} has no {name}")
    return path


PLANTED = {
    "race()": "data race",
    "beyond_the_heap(4)": "heap-buffer-overflow",
    "overflow(1)": "signed integer overflow",
}


def test_planted_bugs_are_reported(build):
    with_threads = "libtsan" in build.environment["LD_PRELOAD"]
    for call, report in PLANTED.items():
        if with_threads == (report == "data race"):
            output = build.run("-c", f"from hetero_glm5 import _C; _C.planted.{call}")
            assert report in output and "bind_planted.cpp" in output and "exit code 0" not in output, output


def test_calls_without_a_bug_are_not(build):
    script = "from hetero_glm5 import _C; print(_C.planted.beyond_the_heap(3), _C.planted.overflow(0))"
    assert build.run("-c", script) == f"0 {2**31 - 1}\nexit code 0\nreports:\n"


def test_the_suites_are_clean(build):
    suites = [str(ROOT / "tests" / suite) for suite in SUITES]
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-k", CHOSEN]
    output = build.run("-m", "pytest", *options, *suites, timeout=1800)
    assert " passed" in output and output.endswith("exit code 0\nreports:\n"), output[-20_000:]
