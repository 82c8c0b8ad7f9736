"""`hetero-glm5 simulate`: what ways of placing experts would make of a trace on a machine, without either."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from hetero_glm5.core import UserError
from hetero_glm5.placement.comparison import GLM5_EXPERT, MACHINES, PLANNERS, Case
from hetero_glm5.placement.cost import Costs
from hetero_glm5.placement.profile import Profile
from hetero_glm5.placement.synthetic import Conversations
from hetero_glm5.placement.trace import Steps, Trace

COLUMNS = (
    "trace",
    "on device",
    "policy",
    "hit rate",
    "copies",
    "host ms",
    "device ms",
    "waiting ms",
    "step ms",
    "tok/s",
)
WIDTH = 120  # where the output is no terminal
SYNTHETIC, LAYERS, STEPS = "synthetic", 25, 1500  # GLM-5 has 75 layers; fewer hit alike and are faster
TRACES = [f"{SYNTHETIC}:topic_tokens={tokens}" for tokens in (2048, 256, 32)]
WARM_UP = 5  # the first fifth of the steps


def simulate(
    traces: Annotated[
        list[str],
        typer.Argument(
            metavar="TRACE...",
            help="files of trace record, or synthetic[:NAME=NUMBER,...], routing like GLM-5's: steps, layers, users, "
            "topic_tokens, recency (0 to 1), seed",
        ),
    ] = TRACES,
    machine: Annotated[
        str, typer.Option(metavar="|".join((*MACHINES, "FILE")), help="modelled, or a profile of bench machine (INT4)")
    ] = "rtx5090",
    shares: Annotated[str, typer.Option(metavar="%,…", help="of all experts on the device")] = "4,10,20,50",
    policies: Annotated[str, typer.Option(metavar="NAME,…", help=f"of {', '.join(PLANNERS)}")] = ",".join(PLANNERS),
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="write all figures there")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="hit rate and tokens/s over the share")] = None,
) -> None:
    """Replay routing through placement policies and a cost model: hit rate, copies and time of a decode step.

    Steps with prefill are not timed. Times are those of the trace's layers, at the sizes of GLM-5's experts in INT4.
    """
    for path in (json, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{path}: {path.absolute().parent} is no folder. Make it first.")
    if plot is not None:
        _figure()  # say what is missing before the work
    names, costs, parts = _names(policies), _machine(machine), _shares(shares)
    rows: list[dict[str, Any]] = []
    table = Table(*COLUMNS, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for trace in traces:
        case = _case(trace, costs)
        for share, name in product(parts, names):
            try:
                found = case.run(name, share)
            except ValueError as error:
                raise UserError(f"{trace}: {error}. Take a longer one.") from error
            rows.append({"trace": trace, "share": share, "policy": name, **asdict(found)})
            table.add_row(*_cells(rows[-1]))
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)
    typer.echo(f"{machine}; copies: of experts, in a step and behind it. The first fifth of a trace is not counted.")
    if json is not None:
        json.write_bytes(orjson.dumps({"machine": machine, "rows": rows}, option=orjson.OPT_INDENT_2))
    if plot is not None:
        _plot(rows, plot)


def _cells(row: dict[str, Any]) -> list[str]:
    times = [f"{1e3 * row[name]:.2f}" for name in ("host", "device", "waiting", "seconds")]
    copies = f"{row['fetches'] + row['moves']:.1f}"
    speed = f"{row['tokens_per_second']:.1f}"
    return [_short(row["trace"]), f"{row['share']:.0%}", row["policy"], f"{row['hit_rate']:.3f}", copies, *times, speed]


def _short(trace: str) -> str:
    return Path(trace).name.removeprefix(f"{SYNTHETIC}:")


def _case(trace: str, costs: Costs) -> Case:
    kind, _, options = trace.partition(":")
    if kind != SYNTHETIC:
        recorded = Trace.load(Path(trace))
        steps = Steps.of(recorded)
        return Case(steps, costs, recorded.ids.shape[2], len(steps) // WARM_UP)
    known = {"steps": int, "layers": int, "users": int, "topic_tokens": float, "recency": float, "seed": int}
    wanted: dict[str, Any] = {"steps": STEPS, "layers": LAYERS}
    for option in filter(None, options.split(",")):
        name, _, number = option.partition("=")
        try:
            wanted[name] = known[name](number)
        except (KeyError, ValueError):
            raise UserError(f"{trace}: {option!r} is none of {'=…, '.join(known)}=… with a number.") from None
    least = {name: number for name, number in wanted.items() if number < (name not in ("recency", "seed"))}
    if least or wanted.get("recency", 0) > 1:
        raise UserError(f"{trace}: recency lies between 0 and 1, a seed from 0, and all else from 1.")
    count = wanted.pop("steps")
    talk = Conversations(**wanted)
    return Case(talk.steps(count), costs, talk.top_k, count // WARM_UP)


def _names(policies: str) -> list[str]:
    names = policies.split(",")
    for name in names:
        if name not in PLANNERS:
            raise UserError(f"--policies names {name!r}; there are {', '.join(PLANNERS)}.")
    return names


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        raise UserError(f"--shares is {text!r}; it takes numbers with commas between.") from None
    for share in shares:
        if not 0 <= share <= 1:
            raise UserError(f"--shares holds {100 * share:g}; it must lie between 0 and 100.")
    return shares


def _machine(name: str) -> Costs:
    return MACHINES[name] if name in MACHINES else Profile.load(Path(name)).costs("INT4", GLM5_EXPERT)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure  # only here: matplotlib is in the `bench` extra
    except ImportError as error:
        raise UserError("--plot needs matplotlib, which is not installed: pip install 'hetero-glm5[bench]'.") from error
    return Figure


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    traces = list(dict.fromkeys(row["trace"] for row in rows))
    figure = _figure()(figsize=(4.5 * len(traces), 7), layout="constrained")
    axes = figure.subplots(2, len(traces), sharex=True, sharey="row", squeeze=False)
    for (line, field), (column, trace) in product(enumerate(("hit_rate", "tokens_per_second")), enumerate(traces)):
        here = axes[line, column]
        for name in dict.fromkeys(row["policy"] for row in rows):
            points = [(100 * r["share"], r[field]) for r in rows if r["trace"] == trace and r["policy"] == name]
            here.plot(*zip(*points, strict=True), marker=".", label=name, linewidth=2 if name == "adaptive" else 1)
        here.set(xlabel="% of experts on the device", ylabel=field.replace("_", " "), title=_short(trace))
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
