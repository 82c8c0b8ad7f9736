"""What a fork-join of the host pool and a job of the queue thread cost beyond their work.

    python bench/bench_pool.py [--calls 2000] [--threads 1,2] [--json]

A call gives each thread one task. Empty tasks show what the caller pays; tasks that are busy for 20 us show whether the
others come in time. over = time less what the tasks take on as many CPUs as there are threads, or on all; slower = time
over that. In the rows called crowded 64 tasks are shared by one, two, four and eight threads for each CPU.
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

CPUS = len(os.sched_getaffinity(0))
GAPS = (0.0, 20e-6, 200e-6, 2e-3)  # seconds
BODIES = (0.0, 20e-6)
CROWDS, CROWDED_TASKS = (1, 2, 4, 8), 64
MOST_SECONDS = 2.0  # of one row, gaps included


def rows(threads: list[int], calls: int) -> Iterator[dict[str, object]]:
    for gap in GAPS:
        fitting = max(1, min(calls, int(MOST_SECONDS / (gap + max(BODIES)))))
        for n in threads:
            yield from (fork_join("fork_join", n, n, body, gap, fitting) for body in BODIES)
        for name, seconds in zip(("hand_over", "there_and_back"), _C.probe.hand_over(gap, fitting), strict=True):
            yield row(name, 1, 0.0, gap, Timing(tuple(seconds)), 0.0)
    for crowd in CROWDS:
        yield fork_join("crowded", crowd * CPUS, CROWDED_TASKS, max(BODIES), 0.0, calls)


def fork_join(name: str, threads: int, tasks: int, body: float, gap: float, calls: int) -> dict[str, object]:
    ideal = body * math.ceil(tasks / min(threads, CPUS))
    return row(name, threads, body, gap, Timing(tuple(_C.probe.fork_join(threads, tasks, body, gap, calls))), ideal)


def row(name: str, threads: int, body: float, gap: float, timing: Timing, ideal: float) -> dict[str, object]:
    return {
        "name": name,
        "threads": threads,
        "body_us": body * 1e6,
        "gap_us": gap * 1e6,
        "calls": len(timing.seconds),
        "over_us": (timing.median - ideal) * 1e6,
        "p99_us": (timing.p99 - ideal) * 1e6,
        "slower": timing.median / ideal if ideal else None,
    }


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
        columns = {"threads": 8, "task us": 9, "gap us": 8, "calls": 7, "over us": 10, "p99 us": 10, "slower": 8}
        print(" " * 15 + "".join(f"{name:>{width}}" for name, width in columns.items()))
    for r in rows(threads, args.calls):
        if args.json:
            print(json.dumps(r), flush=True)
            continue
        line = f"{r['name']:<15}{r['threads']:>8}{r['body_us']:>9.0f}{r['gap_us']:>8.0f}{r['calls']:>7}"
        line += f"{r['over_us']:>10.2f}{r['p99_us']:>10.2f}"
        print(line if r["slower"] is None else f"{line}{r['slower']:>7.2f}x", flush=True)


if __name__ == "__main__":
    main()
