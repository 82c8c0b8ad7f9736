"""A call's time against the least it could have taken: max(bytes / bandwidth, operations / peak).

Bandwidth and peak are measured just before and just after each call, because both change from minute to minute on a
shared machine: a share is taken call by call, and the median of the shares is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import GB

from hetero_glm5 import _C

HEAD = (
    f"{'method':<7}{'layer':<14}{'tokens':>6}{'ms':>10}{'GB/s':>7}{'of bw':>7}{'GFLOP/s':>9}{'roofline':>9}{'error':>9}"
    f"{'outliers':>10}"
)


@dataclass(frozen=True)
class Roof:
    """What the machine could do around a call: bytes and operations per second."""

    bandwidth: float
    peak: float


class Probe:
    """Measures a Roof with all of `threads`, for one instruction. The best of three short peaks counts."""

    def __init__(self, threads: int, nbytes: int) -> None:
        self._c = _C.probe.Roofs(threads, nbytes)

    def __call__(self, instruction: str) -> Roof:
        return Roof(self._c.read(), max(self._c.peak(instruction) for _ in range(3)))


def instruction_of(method: str, isa: str) -> str:
    """The instruction that multiplies this format's weights on that ISA.

    Without VNNI or BF16 dot products a format's numbers are widened; FMA's peak is then what they are held against.
    """
    wide = {"avx2": "fma256", "scalar": "mulps"}.get(isa, "fma512")
    if wide != "fma512" or isa == "avx512" or method == "FP32":
        return wide
    integer, other = ("tdpbsud", "tdpbf16ps") if isa == "amx" else ("vpdpbusd", "vdpbf16ps")
    return integer if method.startswith("INT") else other


@dataclass(frozen=True)
class Sample:
    """One call: its time, what it had to read and to compute, and the roofs before and after it."""

    seconds: float
    nbytes: int
    ops: int
    before: Roof
    after: Roof

    @property
    def bandwidth(self) -> float:
        return (self.before.bandwidth + self.after.bandwidth) / 2

    @property
    def peak(self) -> float:
        return (self.before.peak + self.after.peak) / 2

    @property
    def floor(self) -> float:
        """The least seconds this call can take."""
        return max(self.nbytes / self.bandwidth, self.ops / self.peak)


@dataclass(frozen=True)
class MoeRow:
    """Calls of one layer at one number of tokens. error: ||y - exact|| / ||exact||; outlier_error: of weights with
    outlier columns, of our rows only."""

    method: str
    layer: str  # the ISA that ran, or a peer's name
    tokens: int
    instruction: str
    samples: tuple[Sample, ...]
    error: float
    outlier_error: float | None = None
    ratio: float | None = None  # speed over the best peer's, both as shares of their roofline; of our rows only

    def _median(self, values: Iterable[float]) -> float:
        return float(np.median(list(values)))

    @property
    def seconds(self) -> float:
        return self._median(s.seconds for s in self.samples)

    @property
    def bytes_per_s(self) -> float:
        return self._median(s.nbytes / s.seconds for s in self.samples)

    @property
    def ops_per_s(self) -> float:
        return self._median(s.ops / s.seconds for s in self.samples)

    @property
    def of_bandwidth(self) -> float:
        return self._median(s.nbytes / s.bandwidth / s.seconds for s in self.samples)

    @property
    def of_roofline(self) -> float:
        return self._median(s.floor / s.seconds for s in self.samples)

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "layer": self.layer,
            "tokens": self.tokens,
            "calls": len(self.samples),
            "ms": self.seconds * 1e3,
            "bytes": self._median(s.nbytes for s in self.samples),
            "ops": self.samples[0].ops,
            "gb_per_s": self.bytes_per_s / GB,
            "of_bandwidth": self.of_bandwidth,
            "gflop_per_s": self.ops_per_s / GB,
            "of_roofline": self.of_roofline,
            "bandwidth_gb_per_s": self._median(s.bandwidth for s in self.samples) / GB,
            "peak_gop_per_s": self._median(s.peak for s in self.samples) / GB,
            "instruction": self.instruction,
            "error": self.error,
            "outlier_error": self.outlier_error,
            "of_best_peer": self.ratio,
        }

    def line(self) -> str:
        text = (
            f"{self.method:<7}{self.layer:<14}{self.tokens:>6}{self.seconds * 1e3:>10.2f}{self.bytes_per_s / GB:>7.1f}"
        )
        text += f"{self.of_bandwidth:>7.0%}{self.ops_per_s / GB:>9.0f}{self.of_roofline:>9.0%}{self.error:>9.4f}"
        text += f"{'-' if self.outlier_error is None else format(self.outlier_error, '.4f'):>10}"
        return text + (f"  {self.ratio:.2f}x best peer" if self.ratio else "")


def print_row(row: MoeRow, as_json: bool) -> None:
    print(json.dumps(row.as_dict()) if as_json else row.line(), flush=True)


def plot(rows: list[MoeRow], path: Path) -> None:
    """Operations per second over operations per byte, under the roofs measured with them: a colour for each format, a
    marker for each layer."""
    from matplotlib.figure import Figure  # only here: matplotlib is in the `bench` extra

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="operations / byte", ylabel="GFLOP/s")
    facts = [row.as_dict() for row in rows]
    intensity = np.geomspace(*(edge(fact["ops"] / fact["bytes"] for fact in facts) for edge in (min, max)), 100)
    bandwidth = float(np.median([fact["bandwidth_gb_per_s"] for fact in facts]))
    for instruction in sorted({row.instruction for row in rows}):
        peak = float(np.median([f["peak_gop_per_s"] for f in facts if f["instruction"] == instruction]))
        axes.plot(intensity, np.minimum(intensity * bandwidth, peak), "k--", alpha=0.5)
        axes.annotate(instruction, (intensity[-1], peak), ha="right", va="bottom")
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(row.method for row in rows))}
    markers = dict(zip(dict.fromkeys(row.layer for row in rows), "osv^DPX*", strict=False))
    for method, layer in dict.fromkeys((row.method, row.layer) for row in rows):
        mine = [fact for fact in facts if (fact["method"], fact["layer"]) == (method, layer)]
        points = [f["ops"] / f["bytes"] for f in mine], [f["gflop_per_s"] for f in mine]
        axes.plot(*points, color=colours[method], marker=markers[layer], label=f"{method} {layer}")
    figure.legend(fontsize="small", loc="outside right upper")
    axes.grid(which="both", alpha=0.3)
    figure.savefig(path, dpi=120)
