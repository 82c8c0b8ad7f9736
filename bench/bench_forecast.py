"""What `hetero-glm5 plan` predicts of a decode step on this machine, beside the engine's time with the real weights.

    python bench/bench_forecast.py --model demo|SLICE [--steps 32] [--rounds 3] [engine flags]

Prediction and measurement take turns, so that both see the same machine; their medians are compared. Exits with 1 if
the prediction is off by more than 20 %.
"""

from __future__ import annotations

import hetero_glm5  # noqa: F401, before torch: it bounds the spinning of torch's threads

# isort: split
import argparse
import dataclasses
import statistics
import sys

from bench_decode import decode, new_tokens, prefill

from hetero_glm5 import hardware
from hetero_glm5.cli.fitting import Experts, fit
from hetero_glm5.cli.rehearsal import PROMPT, config_data, rehearse
from hetero_glm5.config import EngineConfig
from hetero_glm5.core import UserError
from hetero_glm5.engine.engine import Engine
from hetero_glm5.flags import add_flags, from_args
from hetero_glm5.model_config import ModelConfig, checkpoint_folder

MOST_OFF = 0.2


def predicted(config: EngineConfig) -> float:
    """Seconds of a decode step, from config.json and the tensors' names."""
    model = ModelConfig.load(config.model)
    found = fit(config, model, Experts.of(config, model), hardware.probe(gpu=config.device != "cpu"))
    decoded, _, _ = rehearse(found.settled, config_data(config.model), found.layout, found.share)
    return decoded.seconds


def measured(config: EngineConfig, steps: int) -> float:
    """Seconds of a decode step, with the weights."""
    engine = Engine.load(dataclasses.replace(config, max_total_tokens=PROMPT + new_tokens(steps) + config.page_size))
    try:
        seqs = prefill(engine, 1, PROMPT, new_tokens(steps))
        return statistics.median(step.wall for step in decode(engine, seqs, steps))
    finally:
        engine.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a predicted decode step with a measured one.")
    parser.add_argument("--steps", type=int, default=32, help="measured steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    add_flags(parser, EngineConfig, "engine")
    args = parser.parse_args()
    config = from_args(EngineConfig, args)
    config = dataclasses.replace(config, model=checkpoint_folder(config.model), max_running_requests=1)
    rounds = [(predicted(config), measured(config, args.steps)) for _ in range(args.rounds)]
    for forecast, real in rounds:
        print(f"predicted {1e3 * forecast:9.3f} ms, measured {1e3 * real:9.3f} ms")
    forecast, real = map(statistics.median, zip(*rounds, strict=True))
    off = forecast / real - 1
    print(f"{1 / forecast:.3g} tokens/s predicted, {1 / real:.3g} measured: {off:+.1%}")
    return int(abs(off) > MOST_OFF)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"bench_forecast: {error}")
