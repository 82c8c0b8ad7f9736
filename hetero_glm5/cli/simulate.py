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
    "drift",
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


def simulate(
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="of trace record; default: synthetic routing like GLM-5's")
    ] = None,
    machine: Annotated[
        str, typer.Option(metavar="|".join((*MACHINES, "FILE")), help="modelled, or a profile of bench machine (INT4)")
    ] = "rtx5090",
    shares: Annotated[str, typer.Option(metavar="%,…", help="of all experts on the device")] = "4,10,20,50",
    drifts: Annotated[str, typer.Option(metavar="TOKENS,…", help="synthetic: a topic's length")] = "2048,256,32",
    policies: Annotated[str, typer.Option(metavar="NAME,…", help=f"of {', '.join(PLANNERS)}")] = ",".join(PLANNERS),
    steps: Annotated[int, typer.Option(min=2, help="synthetic; a fifth of all steps warms up")] = 1500,
    layers: Annotated[int, typer.Option(min=1, help="synthetic; GLM-5 has 75, fewer are faster and hit alike")] = 25,
    users: Annotated[int, typer.Option(min=1, help="synthetic: requests at once")] = 1,
    recency: Annotated[float, typer.Option(min=0, max=1, help="synthetic: how much neighbouring tokens share")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="synthetic")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="write all figures there")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="hit rate and tokens/s over the share")] = None,
) -> None:
    """Replay routing through placement policies and a cost model: hit rate, copies and time of a decode step.

    Steps with prefill are not timed. Times are those of the layers simulated, at GLM-5's INT4 sizes.
    """
    for path in (json, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{path}: {path.absolute().parent} is no folder. Make it first.")
    if plot is not None:
        _figure()  # say what is missing before the work
    names, costs = _names(policies), _machine(machine)
    parts = _numbers("--shares", shares, 0, 100)
    wanted = {"layers": layers, "users": users, "recency": recency, "seed": seed}
    topics = ["trace"] if trace else _numbers("--drifts", drifts, 1, float("inf"))
    rows: list[dict[str, Any]] = []
    table = Table(*COLUMNS, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    console = Console()
    for topic in topics:
        case = _recorded(trace, costs) if trace else _synthetic(float(topic), steps, wanted, costs)
        for share, name in product(parts, names):
            try:
                found = case.run(name, share / 100)
            except ValueError as error:
                raise UserError(f"{trace or '--steps'}: {error}. Take a longer one.") from error
            rows.append({"drift": topic, "share": share / 100, "policy": name, **asdict(found)})
            table.add_row(*_cells(rows[-1]))
    console.print(table)
    console.print(f"{machine}; copies: of experts, in a step; {rows[0]['steps']} steps counted.", highlight=False)
    if json is not None:
        json.write_bytes(orjson.dumps({"machine": machine, **wanted, "rows": rows}, option=orjson.OPT_INDENT_2))
    if plot is not None:
        _plot(rows, plot)


def _cells(row: dict[str, Any]) -> list[str]:
    topic = row["drift"] if row["drift"] == "trace" else f"{row['drift']:g}"
    times = [f"{1e3 * row[name]:.2f}" for name in ("host", "device", "waiting", "seconds")]
    copies = f"{row['fetches'] + row['moves']:.1f}"
    return [topic, f"{row['share']:.0%}", row["policy"], f"{row['hit_rate']:.3f}", copies, *times,
            f"{row['tokens_per_second']:.1f}"]  # fmt: skip


def _synthetic(topic: float, steps: int, wanted: dict[str, Any], costs: Costs) -> Case:
    talk = Conversations(topic_tokens=topic, **wanted)
    return Case(talk.steps(steps), costs, talk.top_k, steps // 5)


def _recorded(path: Path, costs: Costs) -> Case:
    trace = Trace.load(path)
    steps = Steps.of(trace)
    return Case(steps, costs, trace.ids.shape[2], len(steps) // 5)


def _names(policies: str) -> list[str]:
    names = policies.split(",")
    for name in names:
        if name not in PLANNERS:
            raise UserError(f"--policies names {name!r}; there are {', '.join(PLANNERS)}.")
    return names


def _numbers(flag: str, text: str, low: float, high: float) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} is {text!r}; it takes numbers with commas between.") from None
    for number in numbers:
        if not low <= number <= high:
            raise UserError(f"{flag} holds {number:g}; it must lie between {low:g} and {high:g}.")
    return numbers


def _machine(name: str) -> Costs:
    return MACHINES[name] if name in MACHINES else Profile.load(Path(name)).costs("INT4", GLM5_EXPERT)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure  # only here: matplotlib is in the `bench` extra
    except ImportError as error:
        raise UserError("--plot needs matplotlib, which is not installed: pip install 'hetero-glm5[bench]'.") from error
    return Figure


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    topics = list(dict.fromkeys(row["drift"] for row in rows))
    figure = _figure()(figsize=(4.5 * len(topics), 7), layout="constrained")
    axes = figure.subplots(2, len(topics), sharex=True, sharey="row", squeeze=False)
    for (line, field), (column, topic) in product(enumerate(("hit_rate", "tokens_per_second")), enumerate(topics)):
        here = axes[line, column]
        for name in dict.fromkeys(row["policy"] for row in rows):
            points = [(100 * r["share"], r[field]) for r in rows if r["drift"] == topic and r["policy"] == name]
            here.plot(*zip(*points, strict=True), marker=".", label=name, linewidth=2 if name == "adaptive" else 1)
        here.set(xlabel="% of experts on the device", ylabel=field.replace("_", " "), ylim=(0, None))
        here.set_title("trace" if topic == "trace" else f"a topic lasts {topic:g} tokens")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
