"""The oracle: transformers' GlmMoeDsaForCausalLM on the CPU in fp32."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()  # it reports every tensor of the MTP layer, which it does not know

LATENT_EPS = 1e-6  # of the latent norms in transformers; a parameter here


def oracle(folder: Path, **overrides) -> GlmMoeDsaForCausalLM:
    config = GlmMoeDsaConfig.from_pretrained(folder, **overrides)
    model = GlmMoeDsaForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def oracle_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """fp32 [T, vocab]."""
    return oracle(folder)(torch.tensor([token_ids])).logits[0]


def random_ids(count: int, vocab: int = 500, seed: int = 0) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
