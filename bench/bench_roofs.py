"""What this machine can do at most: read bandwidth, and the peak of each instruction that multiplies weights.

    python bench/bench_roofs.py [--mb 4096] [--threads N] [--passes 9] [--json]

Both with all threads. The best pass is the roof; the median beside it tells how busy or unsteady the machine was.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from harness import GB

from hetero_glm5 import _C


def measured(name: str, unit: str, values: list[float]) -> dict[str, object]:
    return {"name": name, "unit": unit, "best": max(values) / GB, "median": float(np.median(values)) / GB}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure read bandwidth and peak operations per second.")
    parser.add_argument("--mb", type=int, default=4096, help="memory to read; far above the caches")
    parser.add_argument("--threads", type=int, default=0, help="0 = every physical core")
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    args = parser.parse_args()
    roofs = _C.probe.Roofs(args.threads, args.mb << 20)
    rows = [measured("read", "GB/s", [roofs.read() for _ in range(args.passes)])]
    for name in _C.probe.instructions():
        rows.append(measured(name, "GOP/s", [roofs.peak(name) for _ in range(args.passes)]))
    if args.json:
        for row in rows:
            print(json.dumps({"threads": roofs.threads, "mb": args.mb} | row))
        return
    print(f"{roofs.threads} threads, {args.mb} MiB, {args.passes} passes; a multiply and an add are two operations")
    print(f"{'':<12}{'best':>10}{'median':>10}")
    for row in rows:
        print(f"{row['name']:<12}{row['best']:>10.1f}{row['median']:>10.1f} {row['unit']}")


if __name__ == "__main__":
    main()
