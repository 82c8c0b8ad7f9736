"""`hetero-glm5 bench quality`: what a model is worth, as tables and as JSON."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from hetero_glm5.cli.quantize import method_named
from hetero_glm5.core import UserError
from hetero_glm5.model_config import DEMO, checkpoint_folder
from hetero_glm5.quality.report import Options, measure

METHODS = "FP32,BF16,FP8,INT8,INT4"
QUICK_COUNT, COUNT = 10, 100

app = typer.Typer(no_args_is_help=True, help="Measure a model.")


@app.callback()
def bench() -> None:
    """Measure a model."""


@app.command()
def quality(
    model: Annotated[str, typer.Option(help="checkpoint folder, or demo: the packaged model")] = DEMO,
    count: Annotated[int, typer.Option(min=0, help=f"questions of each kind; 0 = {COUNT}, quick {QUICK_COUNT}")] = 0,
    methods: Annotated[str, typer.Option(metavar="METHOD,…", help="formats of the experts to compare")] = METHODS,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write all figures there (see quality/report.py)")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the held-out texts and questions")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="a look in under a minute on the demo model")] = False,
) -> None:
    """Held-out perplexity by weight format, questions with known answers, tool calls, drafting and routing, on the CPU.

    Texts and questions are those that the demo model was not trained on; another model can be asked them too.
    """
    options = Options(
        tuple(dict.fromkeys(map(method_named, methods.split(",")))),
        count or (QUICK_COUNT if quick else COUNT),
        seed,
        quick,
    )
    if json is not None and not json.absolute().parent.is_dir():
        raise UserError(f"--json {json}: {json.absolute().parent} is no folder. Make it first.")
    console = Console(stderr=True)
    started = time.monotonic()
    with console.status("starting") as status:

        def tell(doing: str) -> None:
            status.update(doing)
            if not console.is_terminal:
                console.print(f"{time.monotonic() - started:6.1f} s  {doing}", highlight=False)

        found = {"model": model} | measure(checkpoint_folder(model), options, tell)
    if json is not None:
        json.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    _show(Console(), found)


def _show(console: Console, found: dict[str, Any]) -> None:
    for table in (_perplexity(found), _answers(found), _routing(found)):
        console.print(table)
    if found["sparse"] is not None:
        console.print(_sparse(found["sparse"]))
    if found["drafting"] is not None:
        console.print(_drafting(found))
    for sentence in found["left_out"]:
        console.print(f"left out: {sentence}")
    console.print(
        f"{found['model']}, seed {found['seed']}, {found['cpu']}, {found['isa']}, {found['threads']} threads, "
        f"{found['seconds']:.0f} s",
        highlight=False,
    )


def _table(title: str, first: str, *columns: str) -> Table:
    """Narrow enough for 80 columns."""
    table = Table(first, title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _perplexity(found: dict[str, Any]) -> Table:
    first = next(iter(found["perplexity"].values()))
    kinds = [kind for kind in first if kind != "ratio"]
    table = _table("held-out perplexity, the model's own tokens", "", *kinds, "to BF16")
    for method, row in found["perplexity"].items():
        table.add_row(method, *(_short(row[kind]["perplexity"]) for kind in kinds), _percent(row["ratio"] - 1))
    for count, row in found["deferral"].items():
        gaps = [""] * (len(kinds) - 1)
        table.add_row(f"{count} deferred", *gaps, _short(row["perplexity"]), _percent(row["ratio"] - 1))
    table.add_row("tokens", *(f"{first[kind]['tokens']}" for kind in kinds), "")
    return table


def _answers(found: dict[str, Any]) -> Table:
    table = _table("greedy answers, BF16", "", "asked", "right", "well-formed")
    for name, marks in found["answers"].items():
        asked, formed = marks["asked"], marks["well_formed"]
        shares = [f"{100 * part / asked:.1f} %" if part is not None else "" for part in (marks["right"], formed)]
        table.add_row(name, f"{asked}", *shares)
    return table


def _sparse(sparse: dict[str, Any]) -> Table:
    title = f"recall documents of about {sparse['length']} tokens, from token {sparse['index_topk']} on"
    table = _table(f"perplexity of {title}", "", "tokens", "sparse", "dense", "to dense")
    for name, part in (("the model's own", sparse["own"]), ("all", sparse["all"])):
        figures = (_short(part[key]) for key in ("sparse", "dense"))
        table.add_row(name, f"{part['tokens']}", *figures, _percent(part["ratio"] - 1))
    return table


def _drafting(found: dict[str, Any]) -> Table:
    rows = found["drafting"]
    depths = range(1, len(rows["all"]["places"]) + 1)
    title = "MTP drafts: where the first d are right, and tokens for each pass of the model if d are drafted"
    table = _table(title, "", "places", *(f"d = {d}" for d in depths), *(f"tokens, {d}" for d in depths))
    for kind, row in rows.items():
        shares = [f"{100 * share:.1f} %" for share in row["shares"]]
        table.add_row(kind, f"{row['places'][0]}", *shares, *(f"{n:.2f}" for n in row["tokens_per_step"]))
    return table


def _routing(found: dict[str, Any]) -> Table:
    routing = found["routing"]
    tops = [f"top {float(share):.0%}" for share in routing["shares"]]
    title = f"routing, {routing['experts']} experts: share of selections that the most used experts take"
    table = _table(title, "layer", "entropy, bits", *tops)
    for i, layer in enumerate(routing["layers"]):
        shares = (f"{100 * values[i]:.1f} %" for values in routing["shares"].values())
        table.add_row(f"{layer}", f"{routing['entropy'][i]:.3f}", *shares)
    return table


def _short(perplexity: float) -> str:
    return f"{perplexity:.4f}" if perplexity < 10 else f"{perplexity:.5g}"


def _percent(change: float) -> str:
    return f"{100 * change:+.2f} %"
