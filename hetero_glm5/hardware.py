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
    isas: tuple[str, ...]  # kernel sets this CPU can run, best first
    cores: int  # physical cores of this process's cpuset
    numa_nodes: tuple[int, ...]
    ram_total: int  # bytes
    ram_available: int  # bytes
    gpu: str | None
    gpu_total: int  # bytes
    gpu_free: int  # bytes

    @property
    def cuda(self) -> bool:
        return self.gpu is not None


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def probe() -> Hardware:
    nodes = _C.topology()
    memory = psutil.virtual_memory()
    gpu, gpu_free, gpu_total = None, 0, 0
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        gpu_free, gpu_total = torch.cuda.mem_get_info()
    return Hardware(
        cpu=cpu_name(),
        isas=tuple(_C.isas()),
        cores=sum(len(node["physical_cores"]) for node in nodes),
        numa_nodes=tuple(node["id"] for node in nodes),
        ram_total=memory.total,
        ram_available=memory.available,
        gpu=gpu,
        gpu_total=gpu_total,
        gpu_free=gpu_free,
    )
