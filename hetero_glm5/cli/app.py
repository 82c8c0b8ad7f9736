"""The command line: which commands there are, and how their refusals reach the user."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from hetero_glm5.cli import bench, trace
from hetero_glm5.cli.chat import chat
from hetero_glm5.cli.doctor import doctor
from hetero_glm5.cli.plan import plan
from hetero_glm5.cli.quantize import quantize
from hetero_glm5.cli.serve import serve
from hetero_glm5.cli.simulate import simulate
from hetero_glm5.cli.verify import verify
from hetero_glm5.core import UserError

SERVE, PREPARE, MEASURE, LOOK = "Serve", "Prepare", "Measure", "Look"
ANY_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": True}


class _Commands(TyperGroup):
    """Commands whose UserErrors, and files that cannot be read or written, are one sentence and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    help="Serve GLM-5, and what belongs to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(rich_help_panel=SERVE, context_settings=ANY_FLAGS, add_help_option=False)(serve)
app.command(rich_help_panel=SERVE)(chat)
app.command(rich_help_panel=PREPARE, context_settings=ANY_FLAGS)(plan)
app.command(rich_help_panel=PREPARE)(quantize)
app.command(rich_help_panel=PREPARE)(verify)
app.add_typer(bench.app, name="bench", rich_help_panel=MEASURE)
app.command(rich_help_panel=MEASURE)(simulate)
app.command(rich_help_panel=LOOK)(doctor)
app.add_typer(trace.app, name="trace", rich_help_panel=LOOK)
