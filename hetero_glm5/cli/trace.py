"""`hetero-glm5 trace`: which experts the tokens of held-out dialogue are routed to, and what a trace of it holds."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from hetero_glm5.core import SamplingParams, UserError
from hetero_glm5.demo.corpus import tasks
from hetero_glm5.llm import LLM
from hetero_glm5.model_config import DEMO, checkpoint_folder
from hetero_glm5.placement.trace import Trace
from hetero_glm5.quality.answers import prompts
from hetero_glm5.quality.report import ASKED_KINDS
from hetero_glm5.quality.routing import SHARES, describe
from hetero_glm5.quality.tracing import record as record_trace
from hetero_glm5.server.tokenizer import Tokenizer

app = typer.Typer(no_args_is_help=True, help="Record routing traces and look at them.")


@app.callback()
def trace() -> None:
    """Record routing traces and look at them."""


@app.command()
def record(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="new file; its format: hetero_glm5/placement/trace.py")],
    model: Annotated[str, typer.Option(help="checkpoint folder, or demo: the packaged model")] = DEMO,
    requests: Annotated[int, typer.Option(min=1, help="questions to answer")] = 200,
    together: Annotated[int, typer.Option(min=1, help="requests computed together")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens of an answer at most")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="of the questions and of the sampling")] = 0,
) -> None:
    """Answer held-out questions and write down which experts each token was routed to, step by step.

    The file says for each token its step, request, position and phase, and for each MoE layer its experts' ids.
    """
    if out.exists():
        raise UserError(f"{out} exists. Give a new file; nothing is overwritten.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: {out.absolute().parent} is no folder. Make it first.")
    each = -(-requests // len(ASKED_KINDS))
    by_kind = [tasks(kind, each, seed) for kind in ASKED_KINDS]
    asked = list(chain.from_iterable(zip(*by_kind, strict=True)))[:requests]
    folder = checkpoint_folder(model)
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed)
    with LLM(folder, device="cpu", max_running_requests=together, max_queued_requests=requests) as llm:
        texts = prompts(Tokenizer.from_folder(folder), asked)
        found = record_trace(llm, [task.kind for task in asked], texts, params)
    found.save(out)
    typer.echo(_summary(out, found))


@app.command()
def info(file: Annotated[Path, typer.Argument(metavar="FILE", help="a trace that trace record wrote")]) -> None:
    """Say how many tokens a trace holds and how evenly they use the experts, prefill and decode apart.

    Entropy and shares are means over the MoE layers: the share of all selections that goes to the most used experts of
    a layer, which is the best that a fixed choice of so many for each layer could hit on this trace.
    """
    found = Trace.load(file)
    typer.echo(_summary(file, found))
    table = Table("", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("tokens", f"entropy of {math.log2(found.experts):.3f} bits", *(f"top {s:.0%}" for s in SHARES)):
        table.add_column(column, justify="right")
    for phase, rows in (("decode", found.decode), ("prefill", ~found.decode)):
        table.add_row(phase, f"{rows.sum()}", *_figures(found.ids[rows], found.experts))
    Console().print(table)


def _figures(ids: np.ndarray, experts: int) -> list[str]:
    """Mean entropy and shares of ids [tokens, layers, k]; none without tokens."""
    if not len(ids):
        return []
    routing = describe(ids, experts)
    return [f"{np.mean(routing.entropy):.3f}", *(f"{100 * np.mean(layers):.1f} %" for layers in routing.shares)]


def _summary(path: Path, trace: Trace) -> str:
    return (
        f"{path}: {len(trace)} tokens, {trace.decode.sum()} of them decoded, of {len(trace.kinds)} requests in "
        f"{trace.step[-1] + 1 if len(trace) else 0} steps; {trace.ids.shape[2]} of {trace.experts} experts, "
        f"{len(trace.layers)} layers."
    )
