"""The model card: what was trained on what, for how long, and what came out; every number is logged or measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hetero_glm5.demo.corpus import KINDS, MIX
from hetero_glm5.demo.training.data import PROMPT_WEIGHT
from hetero_glm5.demo.training.stages import STAGES
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.names import expected_tensors

TEXT = """\
# A small glm_moe_dsa model

Trained from nothing for hetero_glm5, to have something that answers and that its arithmetic can be judged on. It has
GLM-5's architecture with all its parts (latent attention, a router without auxiliary loss, DSA indexers, an MTP layer)
and {parameters:.1f} million parameters: {layers} layers, hidden size {hidden}, {experts} experts of which each token
visits {chosen}. It knows nothing about the world: use it for tests and demonstrations only.

- Licence: Apache-2.0, as the project's. Language: English.
- Files: weights in BF16 (the routers' biases F32), layer {layers} is the MTP layer; tokenizer of {vocabulary} ids with
  GLM-5's special tokens; GLM-5's chat template.

## Data

Made by seeded programs (`hetero_glm5/demo/corpus`); nothing is taken from elsewhere.
Shares of tokens: {mix}.
Held-out documents share no question, value or fact with those of training. In the loss, tokens that the model writes
count 1, those that users and tools write {prompt_weight}.

## Training

On {machine}, in bf16 with fp32 parameters; Muon for matrices, AdamW for the rest; `python -m hetero_glm5.demo.train`.

| stage | tokens | steps | minutes | what |
|---|---|---|---|---|
{stages}

Cross entropy on held-out documents after each stage, in nats per token that the model writes; that of the MTP layer
is for the token after next. `indexer`: KL of its scores to the attention, per query and layer.

| stage | {names} |
|---|{columns}
{losses}
"""


def write_card(folder: Path, config: dict[str, Any], log: Path, machine: str, evaluation: Path | None = None) -> None:
    """Writes folder/README.md. `evaluation` is JSON: {measurement: value}."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    text = card(config, lines, machine)
    if evaluation is not None:
        measured = json.loads(evaluation.read_text(encoding="utf-8"))
        rows = "\n".join(f"| {name} | {value} |" for name, value in measured.items())
        text += f"\n## Evaluation\n\n| measurement | result |\n|---|---|\n{rows}\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def card(config: dict[str, Any], lines: list[dict[str, Any]], machine: str) -> str:
    names = (*KINDS, "indexer")
    stages, losses = [], []
    for name, stage in STAGES.items():
        own = [line for line in lines if line["stage"] == name]
        if not own:
            continue
        last = own[-1]
        what = (stage.__doc__ or "").strip()
        stages.append(
            f"| {name} | {last['tokens'] / 1e6:.1f} M | {last['step']} | {last['seconds'] / 60:.0f} | {what} |"
        )
        held_out = next((line["held_out"] for line in reversed(own) if "held_out" in line), {})
        losses.append(f"| {name} | " + " | ".join(str(held_out.get(kind, "")) for kind in names) + " |")
    model = ModelConfig.parse(config)
    count = sum(math.prod(spec.shape) for spec in expected_tensors(model, mtp=True).values())
    return TEXT.format(
        parameters=count / 1e6,
        layers=model.num_hidden_layers,
        hidden=model.hidden_size,
        experts=model.n_routed_experts,
        chosen=model.num_experts_per_tok,
        vocabulary=model.vocab_size,
        mix=", ".join(f"{kind} {share:.0%}" for kind, share in MIX.items()),
        prompt_weight=PROMPT_WEIGHT,
        machine=machine,
        stages="\n".join(stages),
        names=" | ".join(names),
        columns="---|" * len(names),
        losses="\n".join(losses),
    )
