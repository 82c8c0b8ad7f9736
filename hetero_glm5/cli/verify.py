"""`hetero-glm5 verify STORE`: reads every packed expert and compares its checksum."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hetero_glm5 import hardware
from hetero_glm5.core import UserError
from hetero_glm5.server.progress import LoadDisplay, start_log
from hetero_glm5.weights.expert_store import ExpertStore


def verify(
    store: Annotated[Path, typer.Argument(help="a store that `hetero-glm5 quantize` has written")],
    threads: Annotated[int, typer.Option(min=0, help="experts read at a time; 0 = all physical cores")] = 0,
) -> None:
    """Read every expert of a packed store and compare its checksum. Exits with 1 if one is damaged."""
    console = Console(stderr=True)
    start_log(console)
    opened = ExpertStore(store)
    display = LoadDisplay(console, "verifying")
    try:
        problems = opened.verify(threads or hardware.probe(gpu=False).cores, display.update)
    finally:
        display.close()
        opened.close()
    if problems:
        raise UserError("\nerror: ".join(problems))
    size, count = opened.bytes_read / 1e9, len(opened.files) * opened.experts
    typer.echo(f"{store}: {count} experts in {len(opened.files)} layers, {size:.3g} GB, all as they were written.")
