"""`hetero-glm5 doctor`: what of this machine the runtime can use, and what to do about the rest; one line for each."""

from __future__ import annotations

import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import orjson
import psutil
import torch
import typer
from rich.console import Console
from rich.markup import escape

from hetero_glm5 import _C, __version__, hardware
from hetero_glm5.hardware import SYSFS, PciLink
from hetero_glm5.placement.memory import GIB

GREEN, YELLOW, RED = "green", "yellow", "red"
MARKS = {GREEN: "✔", YELLOW: "!", RED: "✘"}
PROBE_BYTES, PROBE_SECONDS = 1 << 30, 1.5
TOKEN_BYTES = 12.4e9  # GLM-5's experts in INT4 for one token: 600 of 19.7 MiB
SLOW = 5.0  # tokens/s below which memory is called slow
OLDEST = (3, 10)


@dataclass(frozen=True)
class Check:
    """mark: GREEN, YELLOW (works, but slowly or not everything) or RED (does not); remedy: what to do, unless GREEN."""

    name: str
    mark: str
    text: str
    remedy: str = ""


def doctor(json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Check this machine: kernels, cores, memory and its speed, GPU, versions, with a remedy for what is not right.

    Exits with 1 if a line is red.
    """
    found = list(examine())
    if json:
        typer.echo(orjson.dumps([asdict(check) for check in found], option=orjson.OPT_INDENT_2))
    else:
        console = Console()
        for check in found:
            mark = f"[{check.mark}]{MARKS[check.mark]}[/]"
            remedy = f" [{check.mark}]{escape(check.remedy)}[/]" if check.remedy else ""
            console.print(
                f"{mark} [bold]{check.name:<14}[/]{escape(check.text)}{remedy}", highlight=False, soft_wrap=True
            )
    if any(check.mark == RED for check in found):
        raise typer.Exit(1)


def examine(root: Path = SYSFS, measure: Callable[[], float] | None = None) -> Iterator[Check]:
    """Every check; `root`: where sysfs is; `measure`: bytes/s of memory."""
    nodes = _C.topology(str(root))
    cpus = [cpu for node in nodes for cpu in node["cpus"]]
    yield isa()
    yield cores(sum(len(node["physical_cores"]) for node in nodes), len(cpus), hardware.online_cpus(root))
    yield numa([node["id"] for node in nodes], _C.binds_memory)
    yield memory(psutil.virtual_memory().total, hardware.memory_limit(root))
    yield huge_pages(hardware.huge_pages(root))
    yield governor(hardware.governors(cpus, root))
    yield bandwidth((measure or read_bandwidth)())
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    links = hardware.pci_links(root)
    yield gpu(cards, links, torch.version.cuda)
    yield from map(pcie, links)
    yield memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], bool(cards))
    yield python(sys.version_info[:2])
    yield torch_version(torch.__version__, _required_torch())
    formats = ", ".join(_C.formats())
    yield Check("extension", GREEN, f"hetero_glm5 {__version__}, layout {_C.LAYOUT_VERSION}, formats {formats}")


def isa() -> Check:
    here = _C.isas()
    try:
        return isa_of(_C.selected_isa(), here)
    except ValueError as error:
        return Check("ISA", RED, f"{error}.", f"Unset HETERO_GLM5_ISA: {here[0]} is the best of this CPU.")


def isa_of(used: str, here: list[str]) -> Check:
    """The kernels in use, of those that can run, best first."""
    text = f"{used} kernels, of {', '.join(here)} ({hardware.cpu_name()})"
    if used != here[0]:
        return Check("ISA", YELLOW, text, f"HETERO_GLM5_ISA forces {used}: unset it to use {here[0]}.")
    if used == "scalar":
        return Check("ISA", RED, text, "Use a CPU with AVX2 at least; scalar kernels are for tests.")
    if used == "avx2":
        return Check("ISA", YELLOW, text, "A CPU with AVX-512 prefills several times as fast; decode hardly changes.")
    return Check("ISA", GREEN, text)


def cores(physical: int, usable: int, online: int) -> Check:
    text = f"{physical} physical cores, {usable} CPUs of {online or usable} may be used"
    if usable < online:
        remedy = "The cpuset withholds the others: widen it (taskset, docker --cpuset-cpus) if they are to help."
        return Check("cores", YELLOW, text, remedy)
    return Check("cores", GREEN, text)


def numa(nodes: list[int], binds: Callable[[int], bool]) -> Check:
    text = f"{len(nodes)} NUMA node{'s' if len(nodes) > 1 else ''} ({', '.join(map(str, nodes))})"
    if len(nodes) > 1 and not all(map(binds, nodes)):
        remedy = "The kernel refuses to bind memory: allow mbind (docker --cap-add SYS_NICE), or experts lie anywhere."
        return Check("NUMA", YELLOW, text, remedy)
    return Check("NUMA", GREEN, text)


def memory(total: int, limit: int | None) -> Check:
    text = f"{total / GIB:.0f} GiB"
    if limit is not None and limit < total:
        text += f", of which this control group may use {limit / GIB:.0f}"
        remedy = "Raise its limit (docker --memory), or start with a plan for that much: hetero-glm5 plan --ram."
        return Check("memory", YELLOW, text, remedy)
    return Check("memory", GREEN, text)


def huge_pages(mode: str) -> Check:
    if mode == "never":
        remedy = "Experts then take a TLB miss every 4 KiB: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled."
        return Check("huge pages", YELLOW, mode, remedy)
    return Check("huge pages", GREEN, mode)


def governor(names: set[str]) -> Check:
    if not names:
        return Check("governor", GREEN, "the system does not say, as in virtual machines")
    text = ", ".join(sorted(names))
    if names != {"performance"}:
        return Check("governor", YELLOW, text, "Cores start slowly: sudo cpupower frequency-set -g performance.")
    return Check("governor", GREEN, text)


def read_bandwidth() -> float:
    """The best pass in PROBE_SECONDS, all physical cores, bytes/s."""
    nbytes = min(PROBE_BYTES, psutil.virtual_memory().available // 4)
    roofs, deadline = _C.probe.Roofs(nbytes=nbytes), time.monotonic() + PROBE_SECONDS
    best = roofs.read()
    while time.monotonic() < deadline:
        best = max(best, roofs.read())
    return best


def bandwidth(rate: float) -> Check:
    tokens = rate / TOKEN_BYTES
    text = f"{rate / 1e9:.1f} GB/s read: at most {tokens:.1f} tokens/s of GLM-5 in INT4"
    if tokens < SLOW:
        remedy = "Fill every memory channel, use all sockets, stop what else runs; nothing else bounds decode as much."
        return Check("memory speed", YELLOW, text, remedy)
    return Check("memory speed", GREEN, text)


def gpu(cards: list[str], links: list[PciLink], cuda: str | None) -> Check:
    """cards: that torch sees; cuda: of this torch."""
    if cards:
        return Check("GPU", GREEN, f"{', '.join(cards)}, CUDA {cuda}")
    if links:
        why = "this torch has no CUDA: install one that has" if cuda is None else "check the driver with nvidia-smi"
        remedy = f"Torch sees none of them: {why}."
        return Check("GPU", RED, f"{len(links)} NVIDIA device(s) on the bus", remedy)
    return Check("GPU", GREEN, "none: everything runs on the CPU")


def pcie(link: PciLink) -> Check:
    """Of one GPU. The speed falls while it is idle, the width does not."""
    text = f"{link.address}: {link.width} of {link.most_width} lanes, up to {link.most_speed:g} GT/s each"
    if link.width < link.most_width:
        remedy = "Put the card into a slot with all its lanes: copies of experts and long prefills depend on it."
        return Check("PCIe", YELLOW, text, remedy)
    return Check("PCIe", GREEN, text)


def memlock(limit: int, has_gpu: bool) -> Check:
    if limit == resource.RLIM_INFINITY:
        return Check("memlock", GREEN, "unlimited")
    text = f"{limit / GIB:.2f} GiB"
    if has_gpu:
        remedy = "Host experts that are copied to the GPU get pinned: ulimit -l unlimited (docker --ulimit memlock=-1)."
        return Check("memlock", YELLOW, text, remedy)
    return Check("memlock", GREEN, f"{text}; nothing is pinned without a GPU")


def python(version: tuple[int, ...]) -> Check:
    text = f"{platform.python_version()} {platform.python_implementation()}, {platform.system()} {platform.release()}"
    if version < OLDEST:
        return Check("Python", RED, text, f"Use Python {OLDEST[0]}.{OLDEST[1]} or newer.")
    return Check("Python", GREEN, text)


def _required_torch() -> str | None:
    """The version that the package asks for; None where it is not installed as one."""
    try:
        wanted = metadata.requires("hetero-glm5") or []
    except metadata.PackageNotFoundError:
        return None
    return next((found[1] for found in (re.match(r"torch\s*==\s*([\w.]+)", line) for line in wanted) if found), None)


def torch_version(version: str, required: str | None) -> Check:
    if required is not None and version.split("+")[0] != required:
        return Check("torch", YELLOW, version, f"The tests ran with {required}: pip install torch=={required}.")
    return Check("torch", GREEN, version)
