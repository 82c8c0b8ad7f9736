"""`hetero-glm5 serve`: the launch script under another name."""

from __future__ import annotations

import os
import sys

import typer


def serve(ctx: typer.Context) -> None:
    """Start the server; the same as python -m hetero_glm5.launch_server, whose flags it takes (--help lists them)."""
    os.execv(sys.executable, [sys.executable, "-m", "hetero_glm5.launch_server", *ctx.args])
