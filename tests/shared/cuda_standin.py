"""Drives cuda_standin.cpp: streams without a device, for host experts."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

NOT_READY = 600  # cudaErrorNotReady
SOURCE = Path(__file__).with_name("cuda_standin.cpp")


def build(folder: Path) -> str:
    """Compiles the stand-in with CXXFLAGS -> path of the library, called as the real one would be."""
    compiler, library = shutil.which("c++") or "g++", folder / "libcudart.so.99"
    flags = ["-std=c++20", "-O1", "-g", "-shared", "-fPIC", "-pthread", *os.environ.get("CXXFLAGS", "").split()]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    return str(library)


class Stream:
    """A hetero_glm5 DeviceStream whose device memory is host memory. most_delay: microseconds before an operation;
    one_by_one: its host functions and those of others like it take turns. Memory that was never written is NaN."""

    device = 0

    def __init__(self, library: str, seed: int = 0, most_delay: int = 0, one_by_one: bool = False) -> None:
        self.library = library
        self._lib = ctypes.CDLL(library)
        self._lib.standin_create.restype = ctypes.c_void_p
        self.handle: int = self._lib.standin_create(ctypes.c_uint64(seed), most_delay, one_by_one)
        self._handle = ctypes.c_void_p(self.handle)
        self._in_use: list[Tensor] = []

    def pinned(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype
        assert target.shape == source.shape
        self._in_use += [target, source]
        pointers = ctypes.c_void_p(target.data_ptr()), ctypes.c_void_p(source.data_ptr())
        error = self._lib.cudaMemcpyAsync(*pointers, ctypes.c_size_t(source.nbytes), 0, self._handle)
        assert error != NOT_READY, "an earlier cudaStreamQuery left its error behind"

    def synchronize(self) -> int:
        """-> the device's error, 0 = none."""
        error = self._lib.cudaStreamSynchronize(self._handle)
        self._in_use.clear()
        return error

    def hold(self, held: bool) -> None:
        self._lib.standin_hold(self._handle, held)

    def fail(self, error: int = 719) -> None:
        """From now on nothing enqueued is done, as after a failed kernel."""
        self._lib.standin_fail(self._handle, error)

    def destroy(self) -> None:
        self._lib.standin_destroy(self._handle)


class PatientStream(Stream):
    """Waits after each copy, so that torch can compute with what was copied."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        super().copy(target, source)
        self.synchronize()
