"""Adaptive placement beside all others and beside what bounds it, on synthetic traces that drift at three speeds.

    python bench/bench_placement.py [--machines rtx5090,rtx4090] [--layers 25] [--steps 3000] [--users 1] [--json FILE]

For each machine, length of a topic and share of experts on the device: the hit rate of every policy; the copies in a
step of LRU and of adaptive; `bound`, what no planner can exceed with as many fetches as adaptive had copies, knowing
the future; `quarter`, the hit rate of adaptive when it may copy a quarter of what LRU copies; `fixed f`, adaptive's
step time over that of the best fixed number of fetches for each layer.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import numpy as np

from hetero_glm5.placement.comparison import MACHINES, PLANNERS, Case
from hetero_glm5.placement.planner import Adaptive, Move
from hetero_glm5.placement.simulate import Replay, replay
from hetero_glm5.placement.synthetic import Conversations

TOPICS, SHARES = (2048, 256, 32), (0.04, 0.1, 0.2, 0.5)


class Fixed(Adaptive):
    """Fetches the same number of misses in each layer, as far as they beat their victims."""

    fetches = 0

    def _fetch_count(self, hits: np.ndarray, misses: np.ndarray) -> int:
        return self.fetches


class Capped(Adaptive):
    """Copies at most so many experts between steps, and none within."""

    most = 0

    def _fetch_count(self, hits: np.ndarray, misses: np.ndarray) -> int:
        return 0

    def _order(self, most: int) -> list[Move]:
        return super()._order(min(self.most, most))


def best_fixed(case: Case, share: float) -> tuple[int, float]:
    """(f, seconds of a step), searched upwards until a step takes half as long again as the best."""
    seconds: list[float] = []
    for fetches in count():
        planner = Fixed(case.planner("uniform", share).slot_of, case.costs)
        planner.fetches = fetches
        seconds.append(replay(case.steps, planner, case.costs, case.warm_up).seconds)
        if seconds[-1] > 1.5 * min(seconds) or fetches == case.top_k:
            return int(np.argmin(seconds)), min(seconds)
    raise AssertionError


def capped(case: Case, share: float, copies: float) -> Replay:
    """On a link that would let through all it may copy, so that only the cap counts."""
    costs = replace(case.costs, link=100 * case.costs.link, copy_call=0.0)
    planner = Capped(case.planner("uniform", share).slot_of, costs)
    planner.most = int(copies)
    return replay(case.steps, planner, costs, case.warm_up)


def measure(case: Case, share: float) -> dict:
    found = {name: case.run(name, share) for name in PLANNERS}
    adaptive, lru = found["adaptive"], found["LRU"]
    fetches, seconds = best_fixed(case, share)
    return {
        "hit_rate": {name: row.hit_rate for name, row in found.items()},
        "tokens_per_second": {name: row.tokens_per_second for name, row in found.items()},
        "copies": {name: row.copies for name, row in found.items()},
        "bound": case.most_hits(share, adaptive),
        "quarter": capped(case, share, lru.copies / 4).hit_rate,
        "fixed_f": fetches,
        "over_fixed_f": adaptive.seconds / seconds,
        "adaptive": asdict(adaptive),
    }


def line(row: dict) -> str:
    rates = " ".join(f"{row['hit_rate'][name]:6.3f}" for name in PLANNERS)
    copied = f"{row['copies']['LRU']:6.1f} {row['copies']['adaptive']:6.1f}"
    return (
        f"{row['machine']:<8} {row['topic']:>5} {row['share']:5.0%}  {rates}  {row['bound']:6.3f}  {copied}  "
        f"{row['quarter']:7.3f}  {row['over_fixed_f']:.3f} (f = {row['fixed_f']})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", default=",".join(MACHINES))
    parser.add_argument("--layers", type=int, default=25)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--users", type=int, default=1)
    parser.add_argument("--recency", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = " ".join(f"{name[:6]:>6}" for name in PLANNERS)
    print(f"machine  topic share  {names}   bound     LRU  adapt. quarter  fixed f")
    rows = []
    for topic in TOPICS:
        talk = Conversations(args.layers, users=args.users, topic_tokens=topic, recency=args.recency)
        steps = talk.steps(args.steps)
        for machine in args.machines.split(","):
            case = Case(steps, MACHINES[machine], talk.top_k, args.steps // 5)
            for share in SHARES:
                rows.append({"machine": machine, "topic": topic, "share": share} | measure(case, share))
                print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
