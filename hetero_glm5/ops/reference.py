"""Every op of the model in plain torch: the specification, the path for any device, and the oracle of faster ones.

T rows of a step, S cached positions of one sequence, H heads, c = kv_lora_rank, r = qk_rope_head_dim. Operands may be
fp32 or bf16; norms, softmax, indexer scores and the router compute in fp32. The formulas are GLM-5's
(transformers 5.23.0, GlmMoeDsaForCausalLM); MLA is in its absorbed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # rows are processed in blocks whose largest fp32 temporary has about this many elements


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, weight fp32; returns x's type."""
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Mean and variance over the last axis, weight and bias fp32; returns x's type."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def rope_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of p·θ^(-2j/dim), fp32 [T, dim/2]; the angles are taken in fp64 (p reaches 10^6)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions.double()[:, None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs (x₂ⱼ, x₂ⱼ₊₁) of x [T, ..., dim] by row t's angles [T, dim/2]. Pairing the halves,
    (x_j, x_{j+dim/2}), is another model's way, and goes unnoticed until the indexer starts to choose."""
    shape = [x.shape[0], *[1] * (x.dim() - 2), -1]
    cos, sin = cos.view(shape), sin.view(shape)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) · up x); x [T, hidden], gate and up [intermediate, hidden], down [hidden, intermediate]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


# ---- DeepSeek Sparse Attention ---------------------------------------------------------------------------------------


def index_scores(q: Tensor, head_weights: Tensor, keys: Tensor) -> Tensor:
    """I[t,s] = Σ_h w[t,h] · relu(q[t,h] · k[s]), fp32 [T, S]; q [T, H, D], head_weights [T, H], keys [S, D]."""
    dots = F.relu(q.float() @ keys.float().T)  # [T, H, S]
    return torch.einsum("th,ths->ts", head_weights.float(), dots)


def select_positions(q: Tensor, head_weights: Tensor, keys: Tensor, topk: int) -> Tensor:
    """For rows that are the last T of the S positions: the min(topk, p_t + 1) positions s ≤ p_t with the highest index
    score; int64 [T, topk], best first, unused slots -1. The row's own position is not forced in."""
    keys = keys.float()
    chosen = torch.full((q.shape[0], topk), -1, dtype=torch.int64, device=q.device)
    for rows, future in _causal_blocks(q.shape[0], keys.shape[0], q.shape[1], q.device):
        scores = index_scores(q[rows], head_weights[rows], keys[: future.shape[1]])
        best = scores.masked_fill_(future, float("-inf")).topk(min(topk, future.shape[1]), dim=-1)
        chosen[rows, : best.indices.shape[1]] = best.indices.masked_fill(best.values == float("-inf"), -1)
    return chosen


def _causal_blocks(T: int, S: int, heads: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """The last T of S positions in blocks: which rows, and a mask [rows, end] of what lies in each row's future, where
    `end` is as far as the block can see."""
    block = max(1, BLOCK_ELEMENTS // (heads * S))
    for a in range(0, T, block):
        b = min(a + block, T)
        positions = torch.arange(S - T + a, S - T + b, device=device)
        yield slice(a, b), torch.arange(S - T + b, device=device) > positions[:, None]


# ---- absorbed multi-head latent attention ----------------------------------------------------------------------------


def attend_dense(q: Tensor, context: Tensor, scale: float, latent: int) -> Tensor:
    """Attention over all s ≤ p_t, for rows that are the last T of the S positions. q [T, H, c + r] (absorbed), context
    [S, c + r] cached rows; returns [T, H, latent].

    score = scale · q · row; the output mixes the rows' first `latent` columns."""
    wide = context.float()
    out = torch.empty(*q.shape[:2], latent, dtype=q.dtype, device=q.device)
    for rows, future in _causal_blocks(q.shape[0], context.shape[0], q.shape[1], q.device):
        seen = wide[: future.shape[1]]
        scores = (q[rows].float() @ seen.T * scale).masked_fill_(future[:, None], float("-inf"))
        out[rows] = (scores.softmax(-1) @ seen[:, :latent]).to(q.dtype)
    return out


def attend_selected(q: Tensor, context: Tensor, selection: Tensor, scale: float, latent: int) -> Tensor:
    """Attention over each row's own positions: as attend_dense, with selection [T, k] into context, -1 unused; the
    first of a row must be used. Rows of context that nobody selects are never read."""
    out = torch.empty(*q.shape[:2], latent, dtype=q.dtype, device=q.device)
    block = max(1, BLOCK_ELEMENTS // (selection.shape[1] * context.shape[1]))
    for a in range(0, q.shape[0], block):
        b = a + block
        chosen = selection[a:b]
        unused = chosen < 0
        rows = context[torch.where(unused, chosen[:, :1], chosen)].float()  # [t, k, c + r]
        scores = torch.bmm(q[a:b].float(), rows.transpose(1, 2)) * scale  # [t, H, k]
        weights = scores.masked_fill_(unused[:, None], float("-inf")).softmax(-1)
        out[a:b] = torch.bmm(weights, rows[:, :, :latent]).to(q.dtype)
    return out


# ---- mixture of experts ----------------------------------------------------------------------------------------------


def route(logits: Tensor, bias: Tensor, *, topk: int, groups: tuple[int, int], scale: float, normalise: bool):
    """Chooses experts from router logits fp32 [T, E] and the correction bias fp32 [E].

    g = sigmoid(logits); chosen by g + bias, weighted by g alone. groups = (n_group, topk_group): a group's score is the
    sum of its best two, and only the best topk_group groups take part. Returns ids int64 [T, topk], best first, and
    weights fp32 [T, topk], summing to `scale` if `normalise`.
    """
    gates = logits.sigmoid()
    choice = gates + bias
    n_group, topk_group = groups
    if n_group > 1:
        grouped = choice.view(len(choice), n_group, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
        dropped = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        choice = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(1)
    ids = choice.topk(topk, dim=-1).indices
    weights = gates.gather(1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale


def experts(
    x: Tensor, ids: Tensor, weights: Tensor, matrices: Callable[[int], tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """y[t] = Σ_k weights[t,k] · down(silu(gate x) · up x) of expert ids[t,k], fp32 [T, hidden]; id -1 adds nothing.

    matrices(e) gives (gate, up, down) of expert e in x's type; it is called once for each expert that has rows.
    """
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    order = ids.flatten().argsort(stable=True)  # slots by expert, the unused first
    counts = (ids.flatten() + 1).bincount().tolist()
    for expert, slots in enumerate(order.split(counts), start=-1):
        if expert >= 0 and len(slots):
            rows = slots // ids.shape[1]
            out = swiglu(x[rows], *matrices(expert)).float()
            y.index_add_(0, rows, out * weights.flatten()[slots, None])
    return y
