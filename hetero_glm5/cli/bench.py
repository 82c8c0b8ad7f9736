"""`hetero-glm5 bench`: what a model is worth, and what experts cost on this machine; as tables and as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import typer
from rich.console import Console
from rich.table import Table

from hetero_glm5.cli.quantize import method_named
from hetero_glm5.core import UserError
from hetero_glm5.experts.calibrate import Shape, calibrate
from hetero_glm5.model_config import DEMO, checkpoint_folder
from hetero_glm5.placement.cost import Curve
from hetero_glm5.placement.profile import Profile
from hetero_glm5.quality.report import Options, measure
from hetero_glm5.weights.quantize import ExpertLayout

METHODS = "FP32,BF16,FP8,INT8,INT4"
SERVED_METHODS = "BF16,FP8,INT8,INT4"
QUICK_COUNT, COUNT = 10, 100

app = typer.Typer(no_args_is_help=True, help="Measure a model or this machine.")


@app.callback()
def bench() -> None:
    """Measure a model or this machine."""


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
        _methods(methods),
        count or (QUICK_COUNT if quick else COUNT),
        seed,
        quick,
    )
    _check_folder("--json", json)
    with _telling() as tell:
        found = {"model": model} | measure(checkpoint_folder(model), options, tell)
    if json is not None:
        json.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    _show(Console(), found)


@app.command()
def machine(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="write the profile there, as JSON")] = None,
    methods: Annotated[str, typer.Option(metavar="METHOD,…", help="formats of the experts")] = SERVED_METHODS,
    seconds: Annotated[float, typer.Option(min=1, help="to measure for, about")] = 60.0,
    threads: Annotated[int, typer.Option(min=0, help="for the host experts; 0 = all physical cores")] = 0,
) -> None:
    """Time GLM-5's experts on the host and, where there is a CUDA device, on it, and the link between the two.

    The file tells the placement scheduler and --kt-gpu-prefill-token-threshold auto what each side costs.
    """
    _check_folder("--out", out)
    with _telling() as tell:
        profile = calibrate(_methods(methods), threads=threads, seconds=seconds, tell=tell)
    if out is not None:
        profile.save(out)
    _show_profile(Console(), profile)


def _methods(names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(method_named, names.split(","))))


def _check_folder(flag: str, file: Path | None) -> None:
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(f"{flag} {file}: {file.absolute().parent} is no folder. Make it first.")


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """Gives tell(doing), which shows what is being done: in place on a terminal, as lines elsewhere."""
    console, started = Console(stderr=True), time.monotonic()
    with console.status("starting") as status:

        def tell(doing: str) -> None:
            status.update(doing)
            if not console.is_terminal:
                console.print(f"{time.monotonic() - started:6.1f} s  {doing}", highlight=False)

        yield tell


def _show_profile(console: Console, profile: Profile) -> None:
    for name, curves in ((f"host: {profile.cpu}", profile.host), (f"device: {profile.gpu}", profile.device)):
        if curves:
            console.print(_curves(name, curves))
    if profile.link is None:
        console.print("no CUDA device here: link and device experts were not measured, which auto and moving need.")
    else:
        console.print(f"link {profile.link / 1e9:.1f} GB/s", highlight=False)
    console.print(
        f"{profile.isa}, {profile.threads} threads, {profile.host_call * 1e6:.0f} µs for a call without work",
        highlight=False,
    )


def _curves(name: str, curves: dict[str, Curve]) -> Table:
    """An expert's milliseconds by tokens, GB/s of its weights at the first of them, GFLOP/s at the last."""
    shape = Shape()
    lengths = max((curve.tokens for curve in curves.values()), key=len)[::3]
    title = f"{name}; ms of an expert {shape.hidden} x {shape.intermediate}"
    table = _table(title, "tokens", *(f"{n:g}" for n in lengths), "GB/s", "GFLOP/s")
    for method, curve in curves.items():
        layout = ExpertLayout(method, *shape)
        ms = (f"{1e3 * layout.blob_bytes * float(curve(np.array(n))):.2f}" for n in lengths)
        flops = 2 * 8 / layout.bits_per_weight * curve.tokens[-1] / curve.seconds[-1]
        table.add_row(method, *ms, f"{1e-9 / curve.seconds[0]:.1f}", f"{flops / 1e9:.0f}")
    return table


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
    methods = found["answers"]
    table = _table("greedy answers that are right", "", "asked", *methods)
    for task, marks in methods["BF16"].items():
        table.add_row(task, f"{marks['asked']}", *(_share(of[task], "right") for of in methods.values()))
        if marks["well_formed"] is not None:
            table.add_row("  well-formed", "", *(_share(of[task], "well_formed") for of in methods.values()))
    return table


def _share(marks: dict[str, Any], of: str) -> str:
    return f"{100 * marks[of] / marks['asked']:.1f} %"


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
