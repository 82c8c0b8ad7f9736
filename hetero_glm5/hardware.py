"""Facts about this machine: cores, NUMA nodes, memory, ISA, GPU. Nothing is decided here."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hetero_glm5 import _C


@dataclass(frozen=True)
class Hardware:
    cpu: str
    cores: int  # physical cores of this process's cpuset
    numa_nodes: tuple[int, ...]
    ram_available: int  # bytes
    gpu: str | None
    gpu_free: int  # bytes

    @property
    def cuda(self) -> bool:
        return self.gpu is not None


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def probe(*, gpu: bool) -> Hardware:
    """Looks at the machine; at a CUDA device, which creates a context there, only if `gpu`."""
    nodes = _C.topology()
    has_gpu = gpu and torch.cuda.is_available()
    return Hardware(
        cpu=cpu_name(),
        cores=sum(len(node["physical_cores"]) for node in nodes),
        numa_nodes=tuple(node["id"] for node in nodes),
        ram_available=psutil.virtual_memory().available,
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        gpu_free=torch.cuda.mem_get_info()[0] if has_gpu else 0,
    )
