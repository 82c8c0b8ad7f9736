"""`hetero-glm5 trace record OUT`: which experts the tokens of held-out dialogue are routed to."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from hetero_glm5.core import SamplingParams, UserError
from hetero_glm5.demo.corpus import tasks
from hetero_glm5.llm import LLM
from hetero_glm5.model_config import DEMO, checkpoint_folder
from hetero_glm5.quality.answers import prompts
from hetero_glm5.quality.report import ASKED_KINDS
from hetero_glm5.quality.tracing import record as record_trace
from hetero_glm5.server.tokenizer import Tokenizer

app = typer.Typer(no_args_is_help=True, help="Record routing traces.")


@app.callback()
def trace() -> None:
    """Record routing traces."""


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
    typer.echo(
        f"{out}: {len(found)} tokens, {int(found.decode.sum())} of them decoded, of {requests} requests in "
        f"{int(found.step[-1]) + 1} steps; {found.ids.shape[2]} of {found.experts} experts, {len(found.layers)} layers."
    )
