"""Every op of the model in plain torch: the specification, the path for any device, and the oracle of faster ones.

T rows of a step, S cached positions of one sequence, H heads, c = kv_lora_rank, r = qk_rope_head_dim. Operands may be
fp32 or bf16; norms, softmax, indexer scores and the router compute in fp32. The formulas are GLM-5's
(transformers 5.23.0, GlmMoeDsaForCausalLM); MLA is in its absorbed form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
        # F.rms_norm is one kernel there, and seven operations on a CPU; these five take two thirds of the time.
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
    pairs = torch.view_as_complex(aligned.view(*x.shape[:-1], x.shape[-1] // 2, 2))
    pairs.mul_(rotation if x.dim() == 2 else rotation[:, None])
    return aligned.to(x.dtype)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) · up x); x [T, hidden], gate and up [intermediate, hidden], down [hidden, intermediate]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


# ---- DeepSeek Sparse Attention ---------------------------------------------------------------------------------------


Read = Callable[[Tensor], Tensor]  # cache slots int64 [...] → their rows, fp32 [..., width]


@dataclass(frozen=True)
class Seen:
    """What B sequences with R rows each see: context int64 [B, S], the cache slots of their positions; last int64
    [B, R], the last position that a row sees, at most S - R + r for row r; None: every row sees all."""

    context: Tensor
    last: Tensor | None

    def blocks(self, rows: int, width: int, heads: int) -> Iterator[tuple[slice, list[tuple[slice, int]]]]:
        """Which sequences to read at once, and of them the rows to score at once with the end of what these can see."""
        B, S = self.context.shape
        for first, last in _blocks(B, S * width):
            parts = _blocks(rows, (last - first) * heads * S)
            yield slice(first, last), [(slice(a, b), S - rows + b) for a, b in parts]

    def hide(self, scores: Tensor, seqs: slice, rows: slice) -> Tensor:
        """scores [b, r, ..., end] of these sequences and rows, in place: -inf where a row does not see."""
        if self.last is None:
            return scores
        last = self.last[seqs, rows].view(*scores.shape[:2], *[1] * (scores.dim() - 2))
        return scores.masked_fill_(torch.arange(scores.shape[-1], device=scores.device) > last, float("-inf"))


def _blocks(count: int, elements: int) -> Iterator[tuple[int, int]]:
    """0..count in pieces of at most BLOCK_ELEMENTS, `elements` to each of count."""
    size = max(1, BLOCK_ELEMENTS // elements)
    return ((a, min(a + size, count)) for a in range(0, count, size))


def index_scores(q: Tensor, head_weights: Tensor, keys: Tensor) -> Tensor:
    """I[t,s] = Σ_h w[t,h] · relu(q[t,h] · k[s]), fp32 [B, R, S]; q [B, R, H, D], head_weights [B, R, H], keys
    [B, S, D]."""
    dots = torch.bmm(q.float().flatten(1, 2), keys.transpose(1, 2)).relu_()  # [B, R·H, S]
    dots = dots.view(-1, q.shape[2], dots.shape[-1])  # [B·R, H, S]
    return torch.bmm(head_weights.float().reshape(-1, 1, q.shape[2]), dots).view(*q.shape[:2], -1)


def select_slots(q: Tensor, head_weights: Tensor, read: Read, seen: Seen, topk: int) -> Tensor:
    """The slots of the topk positions with the highest index score that a row sees, of all if it sees fewer; int64
    [B, R, topk], in any order, unused -1. q [B, R, H, D], head_weights [B, R, H]. The row's own position is not forced
    in."""
    chosen = torch.full((*q.shape[:2], topk), -1, dtype=torch.int64, device=q.device)
    for seqs, parts in seen.blocks(q.shape[1], q.shape[3], q.shape[2]):
        context = seen.context[seqs, None]
        keys = read(context[:, 0])  # [b, S, D]
        for rows, end in parts:
            scores = seen.hide(index_scores(q[seqs, rows], head_weights[seqs, rows], keys[:, :end]), seqs, rows)
            best = scores.topk(min(topk, end), dim=-1, sorted=False)
            slots = context.expand(-1, scores.shape[1], -1).gather(-1, best.indices)
            chosen[seqs, rows, : slots.shape[-1]] = slots.masked_fill_(best.values == float("-inf"), -1)
    return chosen


# ---- absorbed multi-head latent attention ----------------------------------------------------------------------------


def attend_dense(q: Tensor, read: Read, seen: Seen, scale: float, latent: int) -> Tensor:
    """Attention over all that a row sees. q [B, R, H, c + r] (absorbed); returns [B, R, H, latent].

    score = scale · q · row; the output mixes the rows' first `latent` columns."""
    B, R, H, width = q.shape
    out = torch.empty(B, R, H, latent, dtype=q.dtype, device=q.device)
    for seqs, parts in seen.blocks(R, width, H):
        keys = read(seen.context[seqs])  # [b, S, c + r]
        for rows, end in parts:
            wanted = q[seqs, rows].float() * scale  # [b, t, H, c + r]
            scores = torch.bmm(wanted.flatten(1, 2), keys[:, :end].transpose(1, 2))  # [b, t·H, end]
            seen.hide(scores.view(*wanted.shape[:3], end), seqs, rows)
            out[seqs, rows] = torch.bmm(scores.softmax(-1), keys[:, :end, :latent]).view(*wanted.shape[:3], latent)
    return out


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
