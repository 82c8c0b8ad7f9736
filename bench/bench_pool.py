"""What a fork-join of the host pool and a job of the queue thread cost beyond their work.

    python bench/bench_pool.py [--calls 2000] [--threads 1,2] [--json]

A call gives each thread one task. Empty tasks show what the caller pays; tasks that are busy for 20 us show whether the
others come in time: over = time less one task's, or less their number per CPU where there are more threads than CPUs.
hand_over is the time from submit to the first instruction of a job of the queue thread, there_and_back until its end.
The gap is how long the caller was busy elsewhere since the call before; threads sleep after about 100 us.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator

from harness import Timing

from hetero_glm5 import _C

GAPS = (0.0, 20e-6, 200e-6, 2e-3)  # seconds
BODIES = (0.0, 20e-6)
MOST_SECONDS = 2.0  # of one row, gaps included


def rows(threads: list[int], calls: int) -> Iterator[dict[str, object]]:
    cpus = len(os.sched_getaffinity(0))
    for gap in GAPS:
        fitting = max(1, min(calls, int(MOST_SECONDS / (gap + max(BODIES)))))
        for n in threads:
            for body in BODIES:
                ideal = body * math.ceil(n / cpus)
                timing = Timing(tuple(_C.probe.fork_join(n, body, gap, fitting)))
                yield row("fork_join", n, body, gap, Timing(tuple(s - ideal for s in timing.seconds)))
        for name, seconds in zip(("hand_over", "there_and_back"), _C.probe.hand_over(gap, fitting), strict=True):
            yield row(name, 1, 0.0, gap, Timing(tuple(seconds)))


def row(name: str, threads: int, body: float, gap: float, over: Timing) -> dict[str, object]:
    facts = {"name": name, "threads": threads, "body_us": body * 1e6, "gap_us": gap * 1e6, "calls": len(over.seconds)}
    return facts | {"median_us": over.median * 1e6, "p99_us": over.p99 * 1e6}


def main() -> None:
    cores = len(_C.physical_cores())
    parser = argparse.ArgumentParser(description="Time the host pool's fork-join and the job queue.")
    parser.add_argument("--calls", type=int, default=2000, help="calls of a row, fewer where the gaps are long")
    parser.add_argument("--threads", help="1,2,...; default 1 to every physical core, and twice as many")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    args = parser.parse_args()
    powers = {min(2**i, cores) for i in range(cores.bit_length() + 1)}
    threads = [int(n) for n in args.threads.split(",")] if args.threads else [*sorted(powers), 2 * cores]
    if not args.json:
        print(f"{'':<15}{'threads':>8}{'task us':>9}{'gap us':>8}{'calls':>7}{'over us':>10}{'p99 us':>10}")
    for r in rows(threads, args.calls):
        if args.json:
            print(json.dumps(r), flush=True)
            continue
        line = f"{r['name']:<15}{r['threads']:>8}{r['body_us']:>9.0f}{r['gap_us']:>8.0f}{r['calls']:>7}"
        print(line + f"{r['median_us']:>10.2f}{r['p99_us']:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
