"""`hetero-glm5 quantize IN OUT --kt-method METHOD`: packs a checkpoint's routed experts into a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from hetero_glm5 import hardware
from hetero_glm5.config import KT_METHODS
from hetero_glm5.core import UserError
from hetero_glm5.flags import did_you_mean
from hetero_glm5.model_config import checkpoint_folder
from hetero_glm5.server.progress import LoadDisplay, start_log
from hetero_glm5.weights.convert import REPORT, Conversion, error_report
from hetero_glm5.weights.quantize import METHODS


def quantize(
    checkpoint: Annotated[str, typer.Argument(metavar="IN", help="checkpoint folder in Hugging Face format, or demo")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="new folder, or one where this was interrupted")],
    kt_method: Annotated[str, typer.Option(metavar="|".join(METHODS), help="weight format to pack the experts in")],
    threads: Annotated[int, typer.Option(min=0, help="experts packed at a time; 0 = all physical cores")] = 0,
    group: Annotated[
        int, typer.Option(metavar="32|64|128", help="columns that share a scale: INT4 32 or the checkpoint's, INT8 128")
    ] = 0,
    book: Annotated[
        str, typer.Option(metavar="gaussian|linear", help="INT4's code books: gaussian, or linear to keep INT4 weights")
    ] = "",
) -> None:
    """Pack a checkpoint's routed experts once, to be served with --kt-weight-path OUT.

    May be stopped at any time: the same command goes on where it was. OUT does not depend on the number of threads.
    """
    console = Console(stderr=True)
    start_log(console)
    torch.set_num_threads(1)  # several experts at a time use the cores better than several threads for one
    conversion = Conversion(Path(checkpoint_folder(checkpoint)), out, method_named(kt_method), group, book)
    if conversion.finished:
        typer.echo(f"{len(conversion.finished)} of {len(conversion.layers)} layers are there already.", err=True)
    display = LoadDisplay(console, "packing")
    try:
        store = conversion.run(threads or hardware.probe(gpu=False).cores, display.update)
    finally:
        display.close()
        conversion.close()
    report = error_report(store)
    _show(report, out)
    typer.echo(
        f"{out}: {len(store.files)} layers of {store.experts} experts as {report['method']}, "
        f"{store.num_bytes(list(store.files)) / 1e9:.3g} GB, {report['bits_per_weight']:.2f} bits per weight. "
        f"Serve them with --kt-weight-path {out}."
    )


def method_named(name: str) -> str:
    """The canonical name of a method that this build can pack, also for one of KTransformers' names. UserError."""
    names = [alias for alias, method in KT_METHODS.items() if method in METHODS]
    known = KT_METHODS.get(name.upper())
    if known in METHODS:
        return known
    hint = did_you_mean(name.upper(), names)
    raise UserError(f"--kt-method is {name!r}; it must be one of {', '.join(METHODS)}{hint}")


def _show(report: dict, out: Path) -> None:
    """Weight error by layer: a table on a terminal, lines elsewhere."""
    console = Console()
    typer.echo(f"weight error |packed - original| / |original|, by expert (also in {out / REPORT}):")
    rows = [
        (f"{e['layer']}", f"{e['mean']:.3e}", f"{e['worst']:.3e}", f"{e['worst_expert']}") for e in report["layers"]
    ]
    rows.append(("all", f"{report['mean']:.3e}", f"{report['worst']:.3e}", ""))
    titles = ("layer", "mean", "worst", "expert")
    if not console.is_terminal:
        for row in (titles, *rows):
            typer.echo("".join(f"{word:>12}" for word in row))
        return
    table = Table(*titles)
    for row in rows:
        table.add_row(*row)
    console.print(table)
