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


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, weight fp32; returns x's type."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight, eps
        self._eps = weight.new_tensor(eps)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        if x.is_cuda:
            return F.rms_norm(wide, x.shape[-1:], self.weight, self.eps).to(x.dtype)
        # There F.rms_norm is one kernel; here it is seven, some of which make tensors of numbers. These are five.
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (wide * inverse).mul_(self.weight).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Mean and variance over the last axis, weight and bias fp32; returns x's type."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def rotations(positions: Tensor, dim: int, theta: float) -> Tensor:
    """exp(i·p·θ^(-2j/dim)), complex64 [T, dim/2]; the angles are taken in fp64 (p reaches 10^6)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions[:, None] * theta**-exponents
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates neighbouring pairs (x₂ⱼ, x₂ⱼ₊₁) of x [T, dim] or [T, heads, dim], each a complex number, by row t's
    rotations [T, dim/2]. Pairing the halves, (x_j, x_{j+dim/2}), is another model's way, and goes unnoticed until the
    indexer starts to choose."""
    aligned = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # x may begin at an odd element
    pairs = torch.view_as_complex(aligned.view(*x.shape[:-1], -1, 2))
    pairs.mul_(rotation if x.dim() == 2 else rotation[:, None])
    return aligned.to(x.dtype)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) · up x); x [T, hidden], gate and up [intermediate, hidden], down [hidden, intermediate]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


# ---- DeepSeek Sparse Attention ---------------------------------------------------------------------------------------


def index_scores(q: Tensor, head_weights: Tensor, keys: Tensor) -> Tensor:
    """I[t,s] = Σ_h w[t,h] · relu(q[t,h] · k[s]), fp32 [T, S]; q [T, H, D], head_weights [T, H], keys [S, D]."""
    dots = F.relu(q.float() @ keys.float().T)  # [T, H, S]
    return torch.bmm(head_weights.float()[:, None], dots).squeeze(1)


def select_positions(q: Tensor, head_weights: Tensor, keys: Tensor, topk: int) -> Tensor:
    """For rows that are the last T of the S positions: the min(topk, p_t + 1) positions s ≤ p_t with the highest index
    score; int64 [T, topk], in any order, unused slots -1. The row's own position is not forced in."""
    T, S = len(q), len(keys)
    chosen = torch.full((T, topk), -1, dtype=torch.int64, device=q.device)
    for a, b in _blocks(T, q.shape[1] * S):
        end = S - T + b  # as far as the block can see
        scores = index_scores(q[a:b], head_weights[a:b], keys[:end])
        if b - a > 1:
            positions = torch.arange(end, device=q.device)
            scores.masked_fill_(positions > positions[a - b :, None], float("-inf"))
        best = scores.topk(min(topk, end), dim=-1, sorted=False)
        chosen[a:b, : best.indices.shape[1]] = best.indices.masked_fill(best.values == float("-inf"), -1)
    return chosen


def _blocks(count: int, elements: int) -> Iterator[tuple[int, int]]:
    """0..count in pieces of at most BLOCK_ELEMENTS, `elements` to each of count."""
    size = max(1, BLOCK_ELEMENTS // elements)
    return ((a, min(a + size, count)) for a in range(0, count, size))


# ---- absorbed multi-head latent attention ----------------------------------------------------------------------------

Read = Callable[[Tensor], Tensor]  # cache slots int64 [...] → their rows, fp32 [..., c + r]


def attend_dense(q: Tensor, read: Read, seen: tuple[Tensor, Tensor | None], scale: float, latent: int) -> Tensor:
    """B sequences of R rows each, the last of their S positions. q [B, R, H, c + r] (absorbed); seen: the positions'
    slots [B, S], and bool [B, R, S], which of them are hidden from a row, or None. Returns [B, R, H, latent].

    score = scale · q · row; the output mixes the rows' first `latent` columns."""
    context, hidden = seen
    (B, R, H, width), S = q.shape, context.shape[1]
    out = torch.empty(B, R * H, latent, dtype=q.dtype, device=q.device)
    queries = (q.float() * scale).view(B, R * H, width)
    for first, last in _blocks(B, S * width):
        seqs = slice(first, last)
        rows = read(context[seqs])  # [b, S, c + r]
        for a, b in _blocks(R, (last - first) * H * S):
            end, t = S - R + b, slice(a * H, b * H)  # positions from `end` on are hidden from the whole block
            scores = torch.bmm(queries[seqs, t], rows[:, :end].transpose(1, 2))  # [b, t·H, end]
            if hidden is not None:
                scores.view(-1, b - a, H, end).masked_fill_(hidden[seqs, a:b, None, :end], float("-inf"))
            out[seqs, t] = torch.bmm(scores.softmax(-1), rows[:, :end, :latent])
    return out.view(B, R, H, latent)


def attend_selected(q: Tensor, read: Read, selection: Tensor, scale: float, latent: int) -> Tensor:
    """Each row of q [T, H, c + r] (absorbed) over slots of its own: selection [T, k], -1 unused, at least one used.
    Returns [T, H, latent]. Slots that nobody selects are never read."""
    out = torch.empty(*q.shape[:2], latent, dtype=q.dtype, device=q.device)
    for a, b in _blocks(len(q), selection.shape[1] * q.shape[2]):
        chosen = selection[a:b]
        unused = chosen < 0
        rows = read(torch.where(unused, chosen.amax(-1, keepdim=True), chosen))  # [t, k, c + r]
        scores = torch.bmm(q[a:b].float() * scale, rows.transpose(1, 2))  # [t, H, k]
        weights = scores.masked_fill_(unused[:, None], float("-inf")).softmax(-1)
        out[a:b] = torch.bmm(weights, rows[..., :latent])
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
