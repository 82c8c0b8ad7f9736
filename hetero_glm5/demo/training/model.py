"""The model that is trained: transformers' GlmMoeDsaForCausalLM and, beside it, the MTP layer, which it lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaDecoderLayer, GlmMoeDsaRMSNorm

from hetero_glm5.demo.training.forward import Forward, linear, rms
from hetero_glm5.demo.training.kernels import Spans


class MTPLayer(nn.Module):
    """The parts of `model.layers.N` under their names on disk, but that the decoder layer's lie below `layer`."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        longer = GlmMoeDsaConfig(**config | {"num_hidden_layers": layers + 1})
        self.enorm, self.hnorm = (GlmMoeDsaRMSNorm(hidden, longer.rms_norm_eps) for _ in range(2))
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.layer = GlmMoeDsaDecoderLayer(longer, layers)
        self.shared_head = nn.ModuleDict({"norm": GlmMoeDsaRMSNorm(hidden, longer.rms_norm_eps)})


class Demo(nn.Module):
    def __init__(self, config: dict[str, Any], seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**config))
        self.mtp = MTPLayer(config)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=_spread(name, parameter, config["num_hidden_layers"]))
        for name, buffer in self.named_buffers():
            if name.endswith("e_score_correction_bias"):
                nn.init.zeros_(buffer)


def _spread(name: str, parameter: Tensor, layers: int) -> float:
    if "embed_tokens" in name:
        return 0.5
    if "lm_head" in name:
        return 0.02
    into_stream = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
    return parameter.shape[-1] ** -0.5 * ((2 * layers) ** -0.5 if into_stream else 1.0)


def mtp_hidden(
    forward: Forward, demo: Demo, hidden: Tensor, tokens: tuple[Tensor, Tensor], spans: Spans, watch: Any = None
) -> Tensor:
    """m [T, d] from the states h [T, d] and (the next tokens t_{i+1}, positions): the embedding's half comes first."""
    following, positions = tokens
    mtp, eps, dtype = demo.mtp, forward.shape.eps, forward.dtype
    embedded = demo.trunk.model.embed_tokens(following)
    z = torch.cat((rms(embedded, mtp.enorm.weight, eps), rms(hidden, mtp.hnorm.weight, eps)), -1)
    x = linear(z, mtp.eh_proj.weight, dtype).float()
    x = forward.layer(x, mtp.layer, spans, forward.rotation(positions), watch)
    return rms(x, mtp.shared_head["norm"].weight, eps).to(dtype)
