"""Facts about this machine: cores, NUMA nodes, memory, ISA, GPU. Nothing is decided here."""

from __future__ import annotations

import platform
from collections.abc import Iterable
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


@dataclass(frozen=True)
class PciLink:
    """A display or compute device of NVIDIA's, as sysfs has it: GT/s and lanes, now and at most; 0 = unknown."""

    address: str
    speed: float
    width: int
    most_speed: float
    most_width: int


def huge_pages(root: Path = SYSFS) -> str:
    """When the kernel gives transparent huge pages: always, madvise or never; never too where it has none."""
    words = _line(root / "kernel/mm/transparent_hugepage/enabled").split()
    return next((word.strip("[]") for word in words if word.startswith("[")), "never")


def governors(cpus: Iterable[int], root: Path = SYSFS) -> set[str]:
    """How these CPUs choose their frequency; empty where the system does not say, as virtual machines do."""
    files = (root / f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor" for cpu in cpus)
    return {governor for governor in map(_line, files) if governor}


def online_cpus(root: Path = SYSFS) -> int:
    """CPUs of the machine, whatever this process may use; 0 = unknown."""
    parts = [part.split("-") for part in _line(root / "devices/system/cpu/online").split(",") if part]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in parts)


def memory_limit(root: Path = SYSFS) -> int | None:
    """Bytes that this process's control group may use at most, as a container sees it."""
    limit = _line(root / "fs/cgroup/memory.max")
    return int(limit) if limit.isdigit() else None


def pci_links(root: Path = SYSFS) -> list[PciLink]:
    found = []
    for device in sorted((root / "bus/pci/devices").glob("*")):
        if _line(device / "vendor") == "0x10de" and _line(device / "class").startswith("0x03"):
            now, most = (
                [_number(device / f"{which}_link_{what}") for what in ("speed", "width")]
                for which in ("current", "max")
            )
            found.append(PciLink(device.name, now[0], int(now[1]), most[0], int(most[1])))
    return found


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _number(path: Path) -> float:
    """The first word as a number: `16.0 GT/s PCIe`."""
    word = _line(path).split(" ")[0]
    return float(word) if word.replace(".", "", 1).isdigit() else 0.0
