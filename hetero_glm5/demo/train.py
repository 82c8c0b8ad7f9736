"""Trains the demo model on a CPU, stage by stage; the same command continues after an interruption.

    python -m hetero_glm5.demo.train --out FOLDER [--stage dense|indexer|sparse|mtp|all] [--tokens N] [--workers W]
    python -m hetero_glm5.demo.train --out FOLDER --stage export [--model FOLDER] [--machine TEXT] [--evaluation FILE]

FOLDER holds the training files, which a process of its own writes (--stage data writes them beforehand), a checkpoint
of each stage and log.jsonl. Needs the `train` extra (transformers) and, unless --no-compile, a C++ compiler.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hetero_glm5.core import UserError
from hetero_glm5.demo.configs import demo_config
from hetero_glm5.demo.tokenizer import EOS, PAD
from hetero_glm5.demo.training.card import write_card
from hetero_glm5.demo.training.data import FILE_TOKENS, load_tokenizer, write_files
from hetero_glm5.demo.training.export import export
from hetero_glm5.demo.training.loop import Plan, checkpoint_path, run
from hetero_glm5.demo.training.stages import STAGES

TOKENS = {"dense": 25e6, "indexer": 1.2e6, "sparse": 3.5e6, "mtp": 3e6}
HELD_OUT_SEED = 7
MODEL = Path(__file__).parent / "model"


def write_data(out: Path, files: int, seed: int) -> None:
    write_files(out, "held-out", 1, HELD_OUT_SEED, FILE_TOKENS // 2)
    write_files(out, "train", files, seed)


def config_for(out: Path) -> dict[str, Any]:
    """demo_config() with what the folder's tokenizer decides."""
    tokenizer = load_tokenizer(out)
    return demo_config() | {
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "eos_token_id": [tokenizer.token_to_id(token) for token in EOS],
        "pad_token_id": tokenizer.token_to_id(PAD),
        "dtype": "bfloat16",
    }


def train(stage: str, args: argparse.Namespace, minutes: float) -> bool:
    """Whether the stage is done."""
    tokens = args.tokens or TOKENS[stage]
    there = len(list(args.out.glob("train-*.npz")))
    files = max(there, math.ceil((args.data_tokens or tokens) / FILE_TOKENS))
    config = config_for(args.out)
    writer = multiprocessing.get_context("spawn").Process(target=write_data, args=(args.out, files, args.seed))
    writer.start()
    try:
        return run(
            Plan(
                out=args.out,
                config=config,
                stage=stage,
                tokens=int(tokens),
                minutes=minutes,
                workers=args.workers,
                length=args.length,
                batches=args.batches,
                files=files,
                seed=args.seed,
                compiled=not args.no_compile,
                matrix_rate=args.matrix_rate,
                table_rate=args.table_rate,
            )
        )
    finally:
        writer.terminate()


def export_last(args: argparse.Namespace) -> None:
    """The checkpoint of the last stage that there is."""
    stage = next((name for name in reversed(STAGES) if checkpoint_path(args.out, name).exists()), None)
    if stage is None:
        raise UserError(f"{args.out} has no checkpoint; train first.")
    state = torch.load(checkpoint_path(args.out, stage), weights_only=True, mmap=True)["model"]
    config = config_for(args.out)
    export(state, config, args.out / "tokenizer.json", args.model)
    write_card(args.model, config, args.out / "log.jsonl", args.machine, args.evaluation)
    print(f"wrote {args.model} after stage {stage}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the training's files")
    parser.add_argument("--stage", choices=("data", *STAGES, "all", "export"), default="all")
    parser.add_argument("--tokens", type=float, default=0, help="planned tokens of the stage; 0: the stage's own")
    parser.add_argument("--data-tokens", type=float, default=0, help="distinct tokens; 0: as many as planned")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long, with a checkpoint")
    parser.add_argument("--workers", type=int, default=2, help="training processes, of one thread each")
    parser.add_argument("--length", type=int, default=8192, help="tokens in a batch; longer documents are left out")
    parser.add_argument("--batches", type=int, default=1, help="batches of each worker in a step")
    parser.add_argument("--matrix-rate", type=float, default=0, help="learning rate of matrices; 0: the stage's")
    parser.add_argument("--table-rate", type=float, default=0, help="learning rate of the rest; 0: the stage's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--model", type=Path, default=MODEL, help="export: where to")
    parser.add_argument("--machine", default="two CPU cores", help="export: what it was trained on, for the card")
    parser.add_argument("--evaluation", type=Path, help="export: JSON of measurements for the card")
    args = parser.parse_args()
    try:
        if args.stage == "data":
            write_data(
                args.out, math.ceil((args.data_tokens or args.tokens or TOKENS["dense"]) / FILE_TOKENS), args.seed
            )
        elif args.stage == "export":
            export_last(args)
        else:
            begun = time.monotonic()
            for stage in STAGES if args.stage == "all" else (args.stage,):
                if not train(stage, args, args.minutes - (time.monotonic() - begun) / 60):
                    break
    except (UserError, OSError) as error:
        sys.exit(f"train: {error}")


if __name__ == "__main__":
    main()
