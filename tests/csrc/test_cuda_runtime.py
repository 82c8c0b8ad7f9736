"""The CUDA runtime is found at run time: where it is looked for, and what is said when it is not there."""

import ctypes
import os
import subprocess
import sys

import pytest
from cuda_standin import Stream

from hetero_glm5 import _C


def test_a_library_by_its_path(standin):
    _C.StreamCalls(Stream(standin).handle, standin).take()


@pytest.mark.parametrize(
    ("library", "sentence"),
    [
        ("/nowhere/libcudart.so", "the CUDA runtime cannot be loaded: /nowhere/libcudart.so"),
        ("libm.so.6", "the CUDA runtime has no cudaLaunchHostFunc"),
    ],
)
def test_a_wrong_library(library, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        _C.StreamCalls(0, library)


SCRIPT = """
import ctypes, sys
from hetero_glm5 import _C
if len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1], mode=int(sys.argv[2]))
try:
    _C.StreamCalls(0, "").take()
    print("found")
except RuntimeError as error:
    print(error)
"""


def search(*arguments: object, **environment: str) -> str:
    """In a process where nothing else, torch included, has loaded a runtime."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return done.stdout.strip()


@pytest.mark.parametrize("mode", [ctypes.RTLD_LOCAL, ctypes.RTLD_GLOBAL])
def test_the_loaded_one_is_taken(standin, mode):
    assert search(standin, mode) == "found"


def test_none_at_all(tmp_path):
    names = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
    for name in names:  # the loader stops at these, should the machine have real ones
        (tmp_path / name).write_text("not a library")
    sentence = search(LD_LIBRARY_PATH=str(tmp_path))
    for part in ("no CUDA runtime", "cudaLaunchHostFunc", *names, "--device cpu"):
        assert part in sentence
