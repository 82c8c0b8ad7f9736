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
import gc
import json
import multiprocessing
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from agent_session import Record, Session, cast
from draft_tally import MOST, Depth, Tally
from step_parts import decode_steps

from hetero_glm5.config import EngineConfig
from hetero_glm5.core import SamplingParams, Sequence, UserError
from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.demo.corpus import documents, tasks
from hetero_glm5.demo.random_checkpoint import write_checkpoint
from hetero_glm5.engine.engine import Engine
from hetero_glm5.model_config import checkpoint_folder
from hetero_glm5.quality.answers import prompts as rendered
from hetero_glm5.server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from generate_peer import Generate

MTP = {"speculative_algorithm": "MTP"}
POOL = 16 * 1024  # tokens, but for the session
BATCHES, PEER_BATCHES, OVERHEAD_BATCHES = (1, 4), (1, 8), (1, 16)
KINDS = ("chats", "sums", "tools", "stories")
FIXED, ADAPTIVE = range(MOST + 1), (3, 4)  # draft depths
BEGINNING = 64  # tokens of a text that is to be continued
DTYPES = ("float32", "bfloat16")
Options = argparse.Namespace


def load(options: Options, **flags: Any) -> Engine:
    torch.set_num_threads(options.threads or torch.get_num_threads())
    config = EngineConfig(
        model=checkpoint_folder(options.model),
        device=options.device,
        dtype=flags.pop("dtype", None) or options.dtype,
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
        if child.exitcode != -signal.SIGKILL:
            sys.exit(f"bench_engine: the process to be killed ended with {child.exitcode} before that.")
        record = Record.read(path)
    play(options, drafting, record, range(half, options.turns), pages)
    return record


def play(
    options: Options, drafting: bool, record: Record, rounds: range, pages: str | None, dies: Path | None = None
) -> None:
    """Rounds of the session with an engine of their own."""
    flags = (MTP if drafting else {}) | ({"kv_disk_path": pages} if pages else {})
    flags |= {"max_total_tokens": 8 * options.tokens, "context_length": options.tokens + 1024}
    engine = load(options, chunked_prefill_size=64, **flags)
    tokenizer = Tokenizer.from_folder(engine.config.model)
    Session(cast(tokenizer, options.turns, options.tokens), record, options.answer).run(engine, rounds, dies)
    engine.close()


@dataclass(frozen=True)
class Run:
    """Some prompts from the first step to the last token. `start`: tokens that had come when all were decoding."""

    outputs: list[list[int]]
    seconds: float
    decode_seconds: float  # from then on
    start: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def decode_rate(self) -> float:
        return (self.tokens - self.start) / self.decode_seconds


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams], batch: int) -> Run:
    """Keeps `batch` sequences going until all prompts are answered."""
    todo, seqs, start = deque(zip(prompts, params, strict=True)), [], 0
    started = decoding = time.perf_counter()
    while todo or engine.busy:
        while todo and engine.num_running + engine.num_waiting < batch:
            seqs.append(engine.add(*todo.popleft()))
        engine.step()
        if not start and not todo and all(seq.num_output for seq in seqs):
            start, decoding = sum(seq.num_output for seq in seqs), time.perf_counter()
    ended = time.perf_counter()
    return Run([seq.output for seq in seqs], ended - started, ended - decoding, start)


def turned(names: Iterable[str], number: int) -> list[str]:
    """In each round another goes first."""
    names = [*names]
    at = number % len(names)
    return names[at:] + names[:at]


def median_ratio(rates: list[float], base: list[float]) -> float:
    """Of rates that were measured in the same rounds."""
    return statistics.median(a / b for a, b in zip(rates, base, strict=True))


def asked(tokenizer: Tokenizer, kind: str, seed: int, count: int) -> list[list[int]]:
    """Held-out prompts; of stories, the beginnings."""
    if kind != "stories":
        return rendered(tokenizer, tasks(kind, count, seed))
    texts = islice(documents(kind, "held-out", seed), count)
    return [tokenizer.encode(text.text)[:BEGINNING] for text in texts]


def drafting(options: Options) -> None:
    flags = {"max_total_tokens": POOL, "disable_radix_cache": True}
    plain = load(options, **flags)
    drafts = load(options, **flags, **MTP, speculative_num_steps=MOST)
    for batch, temperature in product(BATCHES, (0.0, 1.0)):
        tell(drafted(options, plain, drafts, batch, temperature), options)
    plain.close()
    drafts.close()


def drafted(options: Options, plain: Engine, drafts: Engine, batch: int, temperature: float) -> list[dict[str, Any]]:
    """The first round only warms up."""
    tokenizer = Tokenizer.from_folder(plain.config.model)
    depths: dict[str, Depth | None] = {"off": None} | {f"{d}": Depth(d, d) for d in FIXED}
    depths |= {f"chosen, to {d}": Depth(d) for d in ADAPTIVE}
    runs: dict[tuple[str, str], list[Run]] = {}
    tallies: dict[tuple[str, str], Tally] = {}
    for number, kind in product(range(options.rounds + 1), KINDS):
        prompts = asked(tokenizer, kind, number, options.prompts * batch)
        params = [SamplingParams(options.tokens, temperature, seed=seed) for seed in range(len(prompts))]
        for name in turned(depths, number):
            depth, engine = depths[name], plain if depths[name] is None else drafts
            if depth is not None:
                depth.tally = tallies.setdefault((name, kind), Tally()) if number else Tally()
                drafts.drafter.depth = depth
            done = run(engine, prompts, params, batch)
            if number:
                runs.setdefault((name, kind), []).append(done)
    rows = []
    for kind, name in product((*KINDS, "all"), depths):
        kinds = KINDS if kind == "all" else (kind,)
        tally = sum((tallies.get((name, k), Tally()) for k in kinds), Tally())
        rates, off, zero = (
            [rate([runs[n, k][i] for k in kinds]) for i in range(options.rounds)] for n in (name, "off", "0")
        )
        ratios = {"to off": median_ratio(rates, off), "to 0": median_ratio(rates, zero)}
        rows.append(
            {"batch": batch, "temperature": temperature, "kind": kind, "depth": name}
            | tally.row()
            | {"tokens/s": statistics.median(rates)}
            | ratios
        )
    return rows


def rate(runs: list[Run]) -> float:
    """Tokens a second, over all."""
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def peers(options: Options) -> None:
    try:
        import generate_peer
    except ModuleNotFoundError as error:
        raise UserError(f"peers needs {error.name}: pip install transformers==5.23.0.") from None
    folder = checkpoint_folder(options.model)
    prompts = asked(Tokenizer.from_folder(folder), "stories", 0, max(PEER_BATCHES))
    for dtype in DTYPES:
        flags = {"dtype": dtype, "max_total_tokens": POOL, "disable_radix_cache": True}
        engines = {"hetero_glm5": load(options, **flags), "hetero_glm5 + MTP": load(options, **flags, **MTP)}
        device = engines["hetero_glm5"].config.device
        for batch in PEER_BATCHES:
            peer = generate_peer.fastest(folder, dtype, device, prompts[:batch], options.tokens)
            tell(beside(engines, peer, prompts[:batch], options), options)
        for engine in engines.values():
            engine.close()


def beside(
    engines: dict[str, Engine], peer: Generate, prompts: list[list[int]], options: Options
) -> list[dict[str, Any]]:
    """Decodes all prompts together; the tokens after the first ones count."""
    batch, new = len(prompts), options.tokens
    params = [SamplingParams(new, 0.0, ignore_eos=True)] * batch
    rates: dict[str, list[float]] = {name: [] for name in (peer.name, *engines)}
    outputs = {}
    for number in range(options.rounds):
        for name in turned(rates, number):
            if name == peer.name:
                outputs[name], seconds = peer.decode(prompts, new)
                rates[name].append(batch * (new - 1) / seconds)
            else:
                done = run(engines[name], prompts, params, batch)
                outputs[name] = done.outputs
                rates[name].append(done.decode_rate)
    return [
        {"dtype": peer.dtype, "batch": batch, "who": name, "tokens/s": statistics.median(found)}
        | {"to transformers": median_ratio(found, rates[peer.name])}
        | {"same answers": sum(a == b for a, b in zip(outputs[name], outputs[peer.name], strict=True))}
        for name, found in rates.items()
    ]


def overhead(options: Options) -> None:
    flags = {"max_total_tokens": POOL, "disable_radix_cache": False}
    plain, drafts = load(options, **flags), load(options, **flags, **MTP)
    kinds = {"greedy": (plain, 0.0, 1.0), "temperature 1": (plain, 1.0, 1.0), "top_p 0.95": (plain, 1.0, 0.95)}
    kinds["greedy, MTP"] = (drafts, 0.0, 1.0)
    rows = []
    for batch, (name, (engine, temperature, top_p)) in product(OVERHEAD_BATCHES, kinds.items()):
        params = SamplingParams(None, temperature, top_p, ignore_eos=True, seed=0)
        whole = decode_steps(engine, params, batch, options.steps, parts=False)
        by_part = decode_steps(engine, params, batch, options.steps, parts=True)
        outside = [1e3 * (sum(step.values()) - step["model"]) for step in whole]
        row = {"batch": batch, "draws": name, "outside ms": statistics.median(outside)}
        row |= {"mean ms": statistics.mean(outside), "model ms": 1e3 * statistics.median(s["model"] for s in whole)}
        for part in dict.fromkeys(part for step in by_part for part in step):
            if part != "model":
                row[part] = 1e3 * statistics.median(step.get(part, 0.0) for step in by_part)
        rows.append(row)
    columns = dict.fromkeys(name for row in rows for name in row)
    tell([{name: row.get(name, 0.0) for name in columns} for row in rows], options)
    plain.close()
    drafts.close()


def memory(options: Options) -> None:
    rng, rows, cancelled = random.Random(0), [], 0
    with tempfile.TemporaryDirectory() as folder:
        options.model = str(write_checkpoint(Path(folder) / "tiny", tiny_config(), dtype="float32"))
        engine = load(options, max_total_tokens=4096, context_length=256, chunked_prefill_size=128, **MTP)
        cache = engine.scheduler.cache
        beginnings = [some_ids(rng, 150) for _ in range(20)]
        for served, more in ((options.requests // 10,) * 2, (options.requests, options.requests * 9 // 10)):
            cancelled += serve(engine, rng, beginnings, more)
            gc.collect()
            kept, free = cache.num_kept, cache.pool.num_free
            row = {"requests": served, "cancelled": cancelled, "preempted": engine.scheduler.counts.preemptions}
            row |= {"RSS MiB": psutil.Process().memory_info().rss / 2**20, "objects": len(gc.get_objects())}
            rows.append(row | {"kept pages": kept, "free": free, "lost": cache.pool.num_pages - kept - free})
        engine.flush_cache()
        lost = cache.pool.num_pages - cache.pool.num_free
        engine.close()
    tell(rows, options)
    if lost or any(row["lost"] for row in rows):
        sys.exit(f"bench_engine: pages are lost, {lost} of them after everything was forgotten.")


def serve(engine: Engine, rng: random.Random, beginnings: list[list[int]], count: int) -> int:
    """Short requests, half of which share a beginning; a tenth is cancelled. Returns how many those were."""
    cancelled = 0
    patience: dict[Sequence, int] = {}  # steps that a request may still take
    while count or engine.busy:
        while count and engine.num_running + engine.num_waiting < 24:
            shared = rng.choice(beginnings)[: rng.randrange(150)] if rng.random() < 0.5 else []
            params = SamplingParams(rng.randint(1, 8), rng.choice((0.0, 1.0)), ignore_eos=True)
            seq = engine.add(shared + some_ids(rng, rng.randint(1, 30)), params)
            if rng.random() < 0.1:
                patience[seq] = rng.randrange(6)
            count -= 1
        engine.step()
        for seq in [*patience]:
            patience[seq] -= 1
            if seq.finished or patience[seq] < 0:
                cancelled += not seq.finished
                engine.abort(seq)
                del patience[seq]
    return cancelled


def some_ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(500) for _ in range(count)]


COMMANDS: dict[str, tuple[Callable[[Options], None], str, str, dict[str, tuple[int, str]]]] = {
    "replay": (
        replay,
        "float32",
        "an agent's session: tokens prefilled for each new one, restarts included",
        {
            "turns": (40, "requests of the main agent"),
            "tokens": (6000, "of its last prompt, about"),
            "answer": (48, "tokens of an answer at most"),
        },
    ),
    "drafting": (
        drafting,
        "bfloat16",
        "tokens a step and a second at fixed draft depths and chosen ones",
        {"rounds": (5, "that are measured"), "tokens": (64, "of an answer at most"), "prompts": (2, "for each row")},
    ),
    "peers": (
        peers,
        "both",
        "decode beside transformers' generate",
        {"rounds": (5, "that are measured"), "tokens": (128, "that are generated")},
    ),
    "overhead": (
        overhead,
        "bfloat16",
        "the time of a decode step outside the model",
        {"steps": (300, "that are measured")},
    ),
    "memory": (
        memory,
        "float32",
        "resident memory over many requests",
        {"requests": (10_000, "that are served")},
    ),
}


def parse_args() -> Options:
    parser = argparse.ArgumentParser(description="Measure the engine around the model.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, dtype, help, sizes) in COMMANDS.items():
        command = commands.add_parser(name, help=help)
        if name != "memory":
            command.add_argument("--model", default="demo", help="checkpoint folder, or demo")
        if name != "peers":
            command.add_argument("--dtype", default=dtype, choices=DTYPES)
        command.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
        command.add_argument("--threads", type=int, default=0, help="of torch and of the host experts; 0 = all cores")
        command.add_argument("--json", action="store_true", help="JSON lines instead of a table")
        for size, (default, told) in sizes.items():
            command.add_argument(f"--{size}", type=int, default=default, help=f"{told}; default: {default}")
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    COMMANDS[options.command][0](options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bench_engine: {error}")
