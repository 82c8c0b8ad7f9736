"""What the engine adds to the model: prefixes found again, drafts, batches, and the time it takes for itself.

    python bench/bench_engine.py replay     an agent's session: tokens prefilled for each new one, restarts included
    python bench/bench_engine.py drafting   tokens a step and a second at fixed draft depths and the chosen one
    python bench/bench_engine.py peers      decode beside transformers' generate
    python bench/bench_engine.py overhead   the time of a decode step outside the model
    python bench/bench_engine.py memory     resident memory over thousands of requests

What is set against each other runs by turns in one process, and ratios are medians over the turns: other load on the
machine hits all of them alike.
"""

from __future__ import annotations

import hetero_glm5  # noqa: F401, before torch: it bounds the spinning of torch's threads

# isort: split
import argparse
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from agent_session import CANCELS, Record, Session, cast

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import UserError
from hetero_glm5.engine.engine import Engine
from hetero_glm5.model_config import checkpoint_folder
from hetero_glm5.server.tokenizer import Tokenizer

DRAFTING = {"speculative_algorithm": "MTP"}
Options = argparse.Namespace


def load(options: Options, **flags: Any) -> Engine:
    torch.set_num_threads(options.threads or torch.get_num_threads())
    config = EngineConfig(
        model=checkpoint_folder(options.model),
        device=options.device,
        dtype=flags.pop("dtype", options.dtype),
        kt_cpuinfer=options.threads,
        **flags,
    )
    return Engine.load(config)


def tell(rows: list[dict[str, Any]], options: Options) -> None:
    """As a table, or one JSON object a line."""
    if options.json:
        for row in rows:
            print(json.dumps({"bench": options.command, "model": options.model} | row), flush=True)
        return
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    for line in cells:
        print("".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)), flush=True)


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def replay(options: Options) -> None:
    rows = []
    answers = None
    for drafting in (False, True):
        for way in ("straight", "restarted", "killed"):
            with tempfile.TemporaryDirectory() as folder:
                record = replayed(options, drafting, way, Path(folder))
            answers = answers or record.answers
            rows.append(
                {
                    "session": way + (" + MTP" if drafting else ""),
                    "requests": len(record.prompts),
                    "longest": max(map(len, record.prompts)),
                    "cancelled": sum(record.cancelled.values()),
                    "prompt tokens": sum(map(len, record.prompts)),
                    "new": record.new_tokens,
                    "prefilled": record.prefilled,
                    "restored": record.restored,
                    "ratio": record.prefilled / record.new_tokens,
                    "same answers": record.answers == answers,
                }
            )
    tell(rows, options)
    if not all(row["same answers"] for row in rows) and options.dtype == "float32":
        sys.exit("bench_engine: the answers differ, and in float32 they must not.")


def replayed(options: Options, drafting: bool, way: str, folder: Path) -> Record:
    record, half = Record(), options.turns // 2
    if way == "straight":
        play(options, drafting, record, range(options.turns), None)
        return record
    pages = str(folder / "pages")
    if way == "restarted":
        play(options, drafting, record, range(half), pages)
    else:
        path = folder / "record.json"
        arguments = (options, drafting, record, range(half + 1), pages, path)
        child = multiprocessing.get_context("spawn").Process(target=play, args=arguments)
        child.start()
        child.join()
        record = Record.read(path)
    play(options, drafting, record, range(half, options.turns), pages)
    return record


def play(
    options: Options, drafting: bool, record: Record, rounds: range, pages: str | None, dies: Path | None = None
) -> None:
    """Rounds of the session with an engine of their own."""
    flags = (DRAFTING if drafting else {}) | ({"kv_disk_path": pages} if pages else {})
    pool = 8 * options.tokens
    context = options.tokens + 1024
    engine = load(options, chunked_prefill_size=64, max_total_tokens=pool, context_length=context, **flags)
    tokenizer = Tokenizer.from_folder(engine.config.model)
    Session(cast(tokenizer, options.turns, options.tokens), record).run(engine, rounds, dies)
    engine.close()


def parse_args() -> Options:
    parser = argparse.ArgumentParser(description="Measure the engine around the model.")
    parser.add_argument("--model", default="demo", help="checkpoint folder, or demo")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=0, help="of torch and the host experts; 0 = their defaults")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    commands = parser.add_subparsers(dest="command", required=True)
    session = commands.add_parser("replay")
    session.add_argument("--turns", type=int, default=40, help="requests of the main agent")
    session.add_argument("--tokens", type=int, default=6000, help="of its last prompt, about")
    session.set_defaults(call=replay)
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    options.call(options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bench_engine: {error}")
