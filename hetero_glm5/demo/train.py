"""Trains the demo model on a CPU, stage by stage; the same command continues after an interruption.

    python -m hetero_glm5.demo.train --out FOLDER [--stage dense|all|...] [--tokens N] [--minutes M] [--workers W]

Stages: data (writes the training files; otherwise a process of its own does so beside the training), dense, indexer,
sparse, mtp, export. FOLDER holds the data, a checkpoint for each stage and log.jsonl. Needs the `train` extra.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from pathlib import Path

from hetero_glm5.demo.configs import demo_config
from hetero_glm5.demo.tokenizer import EOS, PAD
from hetero_glm5.demo.training.data import FILE_TOKENS, load_tokenizer, write_files
from hetero_glm5.demo.training.loop import Plan, run
from hetero_glm5.demo.training.stages import STAGES

HELD_OUT_SEED = 7


def write_data(out: Path, files: int, seed: int) -> None:
    write_files(out, "held-out", 1, HELD_OUT_SEED, FILE_TOKENS // 2)
    write_files(out, "train", files, seed)


def config_for(out: Path) -> dict:
    tokenizer = load_tokenizer(out)
    return demo_config() | {
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "eos_token_id": [tokenizer.token_to_id(token) for token in EOS],
        "pad_token_id": tokenizer.token_to_id(PAD),
        "dtype": "bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=("data", *STAGES), default="dense")
    parser.add_argument("--tokens", type=float, default=40e6, help="planned tokens of the stage")
    parser.add_argument("--data-tokens", type=float, default=0, help="tokens of distinct data; 0: as many as planned")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long, with a checkpoint")
    parser.add_argument("--workers", type=int, default=2, help="training processes, of one thread each")
    parser.add_argument("--length", type=int, default=8192, help="tokens in a batch; longer documents are left out")
    parser.add_argument("--batches", type=int, default=1, help="batches of each worker in a step")
    parser.add_argument("--matrix-rate", type=float, default=0, help="learning rate of matrices; 0: the stage's")
    parser.add_argument("--table-rate", type=float, default=0, help="learning rate of the rest; 0: the stage's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = math.ceil((args.data_tokens or args.tokens) / FILE_TOKENS)
    if args.stage == "data":
        write_data(args.out, files, args.seed)
        return
    config = config_for(args.out)
    writer = multiprocessing.get_context("spawn").Process(target=write_data, args=(args.out, files, args.seed))
    writer.start()
    try:
        run(
            Plan(
                out=args.out,
                config=config,
                stage=args.stage,
                tokens=int(args.tokens),
                minutes=args.minutes,
                workers=args.workers,
                length=args.length,
                batches=args.batches,
                files=files,
                seed=args.seed,
                matrix_rate=args.matrix_rate,
                table_rate=args.table_rate,
            )
        )
    finally:
        writer.terminate()


if __name__ == "__main__":
    main()
