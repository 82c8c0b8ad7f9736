"""KTransformers' published placement table (Qwen3-Next-80B on 4 RTX 4090) beside the simulator's.

    python bench/bench_published.py [--layers 12] [--steps 3000]

What was published are tokens/s with a tenth, half and four fifths of the experts on the devices; what the machine does
otherwise was not, so it is fitted, to the `uniform` column, whose hit rates are known: a layer takes 85 µs without the
host, 173 µs more when it has any expert to compute, and 12.3 µs for each, which are 256 GB/s on an FP8 expert.
Assumed, and fitted roughly to the other two columns: one user and 64 topics, which last 1,024 decoded tokens; prompts
of 1,024 tokens, answers of 256; scores with deviations of 0.7 between experts and 2.0 between topics. `frequency`
counts the half of the trace that is not timed. `kt-dynamic` re-picks at every prompt, and the time of its copies, over
four links of 25 GB/s, counts as the answer's. Layers are alike, so a few stand for all 48.
"""

from __future__ import annotations

import argparse

import numpy as np

from hetero_glm5.placement.comparison import Case
from hetero_glm5.placement.cost import Costs, Curve
from hetero_glm5.placement.planner import Static
from hetero_glm5.placement.policy import frequency, slots
from hetero_glm5.placement.simulate import replay
from hetero_glm5.placement.synthetic import Conversations

LAYERS, EXPERTS, TOP_K = 48, 512, 10
PUBLISHED = {  # tokens/s, by share of the experts on the devices
    0.1: {"uniform": 56.6, "frequency": 58.6, "kt-dynamic": 70.2},
    0.5: {"uniform": 65.3, "frequency": 76.2, "kt-dynamic": 81.2},
    0.8: {"uniform": 79.2, "frequency": 100.7, "kt-dynamic": 92.3},
}
EXPERT = 3 * 2048 * 512  # bytes, FP8
COSTS = Costs(
    EXPERT,
    host=Curve.roofline(256e9, 3e12, 8),
    device=Curve.roofline(1e12, 150e12, 8),
    link=4 * 25e9,
    host_call=173e-6,
    layer=85e-6,
)


def simulated(case: Case, share: float) -> dict[str, float]:
    """Tokens/s of all LAYERS by policy."""
    layers = case.steps.decode.shape[1]
    earlier = case.steps.decode[: case.warm_up].sum(axis=0, dtype=np.float64)
    recorded = Static(slots(frequency(earlier, case.budget(share))))
    found = {name: case.run(name, share) for name in ("uniform", "kt-dynamic", "adaptive")}
    found["frequency"] = replay(case.steps, recorded, case.costs, case.warm_up)
    return {name: row.tokens_per_second * layers / LAYERS for name, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    talk = Conversations(
        args.layers, EXPERTS, TOP_K, topics=64, topic_tokens=1024, prompt=(1024, 1024), answer=(256, 256),
        fields=(0.7, 2.0, 0.0),
    )  # fmt: skip
    case = Case(talk.steps(args.steps), COSTS, TOP_K, args.steps // 2)
    print("tokens/s: simulated (published, difference)")
    for share, published in PUBLISHED.items():
        found = simulated(case, share)
        cells = [f"{n} {found[n]:6.1f} ({p:5.1f}, {found[n] / p - 1:+4.0%})" for n, p in published.items()]
        print(f"{share:4.0%}  {'   '.join(cells)}   adaptive {found['adaptive']:6.1f}")


if __name__ == "__main__":
    main()
