"""The forward pass of training, over the parameters of transformers' GlmMoeDsaForCausalLM.

The same function as transformers' forward for each document by itself, with attention to all earlier tokens (the
indexer is not computed) or to a selection. The residual stream and norms are fp32, products bf16 (or `dtype`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_glm5.demo.training.kernels import Attend, Kernels, RoutedExperts, Spans, compile_


class Shape(NamedTuple):
    heads: int
    nope: int
    rope: int
    value: int
    latent: int
    eps: float


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs (x0, x1) turned by one angle each, written first halves first, as transformers does."""
    x = x.float()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


def _qkv(x: Tensor, norm: Tensor, w: list[Tensor], rotation: tuple[Tensor, Tensor], shape: Shape, dtype: torch.dtype):
    """q (scaled), k [H, T, nope + rope], v [H, T, value] of x [T, d]; and the normed input and query latent, which the
    indexer reads."""
    q_a, q_norm, q_b, kv_a, kv_norm, kv_b = w
    cos, sin = rotation
    h = rms(x, norm, shape.eps).to(dtype)
    ql = rms(linear(h, q_a, dtype), q_norm, 1e-6).to(dtype)  # transformers' constant for both latents
    q = linear(ql, q_b, dtype).view(len(x), shape.heads, -1)
    c, k_rope = linear(h, kv_a, dtype).split((shape.latent, shape.rope), -1)
    kv = linear(rms(c, kv_norm, 1e-6), kv_b, dtype).view(len(x), shape.heads, -1)
    q_nope, q_rope = q.split((shape.nope, shape.rope), -1)
    k_nope, v = kv.split((shape.nope, shape.value), -1)
    k_rope = rotate(k_rope, cos, sin)[:, None].expand(-1, shape.heads, -1)
    q = torch.cat((q_nope.float(), rotate(q_rope, cos[:, None], sin[:, None])), -1) * (shape.nope + shape.rope) ** -0.5
    k = torch.cat((k_nope.float(), k_rope), -1)
    return (*(t.to(dtype).transpose(0, 1).contiguous() for t in (q, k, v)), h, ql)


def _after(x: Tensor, attended: Tensor, o_proj: Tensor, norm: Tensor, eps: float, dtype: torch.dtype):
    """The residual stream after attention [H, T, value], and the input of the MLP."""
    flat = attended.transpose(0, 1).reshape(len(x), -1)
    x = x + linear(flat, o_proj, dtype).float()
    return x, rms(x, norm, eps).to(dtype)


def _mlp(h: Tensor, gate: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    return linear(F.silu(linear(h, gate, dtype).float()) * linear(h, up, dtype).float(), down, dtype).float()


def _scores(h: Tensor, gate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.linear(h.float(), gate).sigmoid()
    return scores, scores.detach() + bias


class Forward:
    """Callables that take transformers' modules. `load` receives (layer, tokens per expert) if given."""

    def __init__(self, config: Any, *, compiled: bool = True, dtype: torch.dtype = torch.bfloat16):
        c = config
        self.shape = Shape(
            c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank, c.rms_norm_eps
        )
        self.config, self.dtype, self.kernels = config, dtype, Kernels(compiled)
        wrap: Callable[[Any], Any] = compile_ if compiled else lambda f: f
        self.qkv, self.after, self.mlp, self.scores = (wrap(f) for f in (_qkv, _after, _mlp, _scores))
        theta = config.rope_parameters["rope_theta"]
        self.frequencies = theta ** -(torch.arange(0, self.shape.rope, 2).float() / self.shape.rope)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions.float()[:, None] * self.frequencies
        return angle.cos(), angle.sin()

    def layer(self, x: Tensor, module: Any, spans: Spans, rotation: tuple[Tensor, Tensor], watch: Any = None) -> Tensor:
        """One decoder layer over x [T, d]. `watch` may give attention its hooks and takes the load of the experts."""
        attention = module.self_attn
        weights = [
            attention.q_a_proj.weight, attention.q_a_layernorm.weight, attention.q_b_proj.weight,
            attention.kv_a_proj_with_mqa.weight, attention.kv_a_layernorm.weight, attention.kv_b_proj.weight,
        ]  # fmt: skip
        q, k, v, h, ql = self.qkv(x, module.input_layernorm.weight, weights, rotation, self.shape, self.dtype)
        hooks = None if watch is None else watch.attention(attention, (h, ql), rotation)
        attended = Attend.apply(q, k, v, spans, hooks)
        if hooks is not None:
            hooks.finish()
        norm = module.post_attention_layernorm.weight
        x, h = self.after(x, attended, attention.o_proj.weight, norm, self.shape.eps, self.dtype)
        mlp = module.mlp
        if not hasattr(mlp, "experts"):
            return x + self._mlp(h, mlp)
        return x + self._mlp(h, mlp.shared_experts) + self.experts(h, mlp, watch).float()

    def _mlp(self, h: Tensor, mlp: nn.Module) -> Tensor:
        return self.mlp(h, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, self.dtype)

    def experts(self, h: Tensor, mlp: Any, watch: Any = None) -> Tensor:
        c = self.config
        scores, choice = self.scores(h, mlp.gate.weight, mlp.gate.e_score_correction_bias)
        chosen = choice.topk(c.num_experts_per_tok, -1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        if watch is not None:
            watch.load(mlp.gate, torch.bincount(chosen.reshape(-1), minlength=c.n_routed_experts))
        return RoutedExperts.apply(h, weights, (chosen, self.kernels), mlp.experts.gate_up_proj, mlp.experts.down_proj)

    def trunk(self, model: Any, tokens: Tensor, positions: Tensor, spans: Spans, watch: Any = None) -> Tensor:
        """Hidden states [T, d] after the final norm, in `dtype`."""
        x = model.embed_tokens(tokens).float()
        rotation = self.rotation(positions)
        for module in model.layers:
            x = self.layer(x, module, spans, rotation, watch)
        return rms(x, model.norm.weight, self.shape.eps).to(self.dtype)
