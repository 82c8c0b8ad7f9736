"""Facts about this machine: cores, NUMA nodes, memory, ISA, GPU. Nothing is decided here."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hetero_glm5 import _C

SYSFS = Path("/sys")


@dataclass(frozen=True)
class NumaNode:
    cores: int  # physical cores of this process's cpuset
    ram_available: int  # bytes: free, or holding what can be read again from files


@dataclass(frozen=True)
class Hardware:
    cpu: str
    numa: dict[int, NumaNode]  # by id, those with usable cores
    ram_available: int  # bytes
    gpu: str | None
    gpu_free: int  # bytes

    @property
    def cuda(self) -> bool:
        return self.gpu is not None

    @property
    def cores(self) -> int:
        return sum(node.cores for node in self.numa.values())


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def node_ram(node: int, root: Path = SYSFS) -> int:
    """Bytes of a NUMA node that are free or hold file pages; of the machine where the kernel shows no nodes."""
    path = root / f"devices/system/node/node{node}/meminfo"
    if not path.exists():
        return psutil.virtual_memory().available
    counted = ("MemFree:", "Active(file):", "Inactive(file):")
    lines = map(str.split, path.read_text(encoding="ascii").splitlines())  # Node 0 MemFree: 5039160 kB
    return sum(int(size) << 10 for _, _, name, size, *_ in lines if name in counted)


def probe(*, gpu: bool) -> Hardware:
    """Looks at the machine; at a CUDA device, which creates a context there, only if `gpu`."""
    has_gpu = gpu and torch.cuda.is_available()
    return Hardware(
        cpu=cpu_name(),
        numa={n["id"]: NumaNode(len(n["physical_cores"]), node_ram(n["id"])) for n in _C.topology()},
        ram_available=psutil.virtual_memory().available,
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        gpu_free=torch.cuda.mem_get_info()[0] if has_gpu else 0,
    )
