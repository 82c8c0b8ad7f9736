"""Writes a slice of GLM-5 with random weights: few layers and experts, each of its true shape.

    python bench/make_slice.py OUT --experts 16 [--dense 1] [--moe 2] [--mtp] [--fp8] [--vocab N] [--dtype bfloat16]

For measuring a decode or prefill step layer by layer on a machine that cannot hold the whole model.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

from shapes import GLM5, slice_config

from hetero_glm5.core import UserError
from hetero_glm5.demo.random_checkpoint import DTYPES, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a slice of GLM-5 with random weights.")
    parser.add_argument("out", help="new or empty folder")
    parser.add_argument("--experts", type=int, required=True, help="routed experts for each MoE layer; at least 8")
    parser.add_argument("--dense", type=int, default=1, help="dense layers")
    parser.add_argument("--moe", type=int, default=2, help="MoE layers")
    parser.add_argument("--mtp", action="store_true", help="with the multi-token-prediction layer")
    parser.add_argument("--vocab", type=int, default=GLM5["vocab_size"])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--fp8", action="store_true", help="Linear weights in FP8 with 128x128 blocks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = slice_config(dense=args.dense, moe=args.moe, experts=args.experts, vocab=args.vocab, mtp=args.mtp)
    start = time.perf_counter()
    try:
        folder = write_checkpoint(args.out, config, seed=args.seed, dtype=args.dtype, fp8=args.fp8)
    except (UserError, OSError) as error:
        sys.exit(f"make_slice: {error}")
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in folder.iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"wrote {folder}: {size / 1e9:.2f} GB in {seconds:.1f} s ({size / seconds / 1e9:.2f} GB/s), "
        f"peak memory {peak / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
