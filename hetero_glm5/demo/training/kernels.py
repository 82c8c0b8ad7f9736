"""Attention over documents, routed experts and cross entropy, each with its own backward pass, in bf16 with fp32 sums.

A batch is a flat row of T tokens that holds whole documents; `spans` are their (start, end). Nothing is padded, and no
token sees another document. On a CPU large matrix products in bf16 run about four times as fast as in fp32, and these
three are where transformers' code (a mask of T x T, a pass over all tokens for each expert, logits in fp32) loses them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Spans = list[tuple[int, int]]
BLOCK = 256  # queries of a long document that are scored at a time, against the keys up to their end
CHUNK = 1024  # tokens whose logits exist at a time


def blocks(start: int, end: int) -> list[tuple[int, int]]:
    """The queries of a document in blocks of about BLOCK."""
    count = max(1, round((end - start) / BLOCK))
    edges = [start + (end - start) * i // count for i in range(count + 1)]
    return list(zip(edges, edges[1:], strict=False))


class Attend(torch.autograd.Function):
    """Causal attention within documents. q (scaled) and k [H, T, D], v [H, T, V] -> [H, T, V].

    `hooks.allowed(start, a, b)` gives the mask [b-a, b-start] of what queries a..b may attend to besides causality, or
    None for all; `hooks.seen(p)` is then handed the probabilities [H, b-a, b-start].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Spans, hooks: Any = None) -> Tensor:
        out, saved = torch.empty_like(v), []
        for start, end in spans:
            for a, b in blocks(start, end):
                scores = q[:, a:b] @ k[:, start:b].transpose(1, 2)
                future = torch.ones(b - a, b - a, dtype=torch.bool).triu_(1)
                scores[:, :, a - start :].masked_fill_(future, -torch.inf)
                if hooks is not None and (allowed := hooks.allowed(start, a, b)) is not None:
                    scores.masked_fill_(~allowed, -torch.inf)
                p = torch.softmax(scores, -1)
                if hooks is not None:
                    hooks.seen(p)
                torch.bmm(p, v[:, start:b], out=out[:, a:b])
                saved.append((start, a, b, p))
        ctx.save_for_backward(q, k, v)
        ctx.saved = saved
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for start, a, b, p in ctx.saved:
            g = grad[:, a:b]
            dv[:, start:b] += p.transpose(1, 2) @ g
            dp = g @ v[:, start:b].transpose(1, 2)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            torch.bmm(ds, k[:, start:b], out=dq[:, a:b])
            dk[:, start:b] += ds.transpose(1, 2) @ q[:, a:b]
        ctx.saved = None
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _activate(gate_up: Tensor, weight: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up * weight[:, None]).to(gate_up.dtype)


def _activate_backward(grad: Tensor, gate_up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.float().chunk(2, -1)
    grad = grad.float()
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    dweight = (grad * silu * up).sum(-1)
    grad = grad * weight[:, None]
    dgate = grad * up * (sigmoid + silu * (1 - sigmoid))
    return torch.cat((dgate, grad * silu), -1).to(gate_up.dtype), dweight


def _gather_sum(rows: Tensor, place: Tensor) -> Tensor:
    return rows[place].float().sum(1).to(rows.dtype)


class Kernels:
    """The elementwise parts, compiled if `compiled`."""

    def __init__(self, compiled: bool):
        wrap = compile_ if compiled else lambda f: f
        self.activate, self.activate_backward = wrap(_activate), wrap(_activate_backward)
        self.gather_sum, self.loss = wrap(_gather_sum), wrap(_loss)


def compile_(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


class RoutedExperts(torch.autograd.Function):
    """Sum over each token's experts of weight · down(silu(gate x) · (up x)).

    x [T, d], weights [T, k], routing = (experts [T, k], Kernels), gate_up [E, 2·I, d] (gate rows first), down
    [E, d, I] -> [T, d]. Rows are sorted by expert, so that each expert is one product; the routing weight enters before
    `down`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, routing: Any, gate_up: Tensor, down: Tensor) -> Tensor:
        experts, kernels = routing
        per_token = experts.shape[1]
        order = torch.argsort(experts.reshape(-1), stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        place = place.view(-1, per_token)  # where row (token, choice) lies among the sorted
        ends = torch.bincount(experts.reshape(-1), minlength=len(down)).cumsum(0).tolist()
        ranges = list(enumerate(zip([0, *ends[:-1]], ends, strict=True)))
        gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
        rows = x[order // per_token]
        hidden = x.new_empty(len(order), gate_up.shape[1])
        for e, (a, b) in ranges:
            torch.mm(rows[a:b], gate_up[e].t(), out=hidden[a:b])
        weight = weights.reshape(-1)[order]
        active = kernels.activate(hidden, weight)
        out = torch.empty_like(rows)
        for e, (a, b) in ranges:
            torch.mm(active[a:b], down[e].t(), out=out[a:b])
        ctx.save_for_backward(rows, hidden, active, weight, order, place, gate_up, down)
        ctx.ranges, ctx.kernels = ranges, kernels
        return kernels.gather_sum(out, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, active, weight, order, place, gate_up, down = ctx.saved_tensors
        grads = grad.to(rows.dtype)[order // place.shape[1]]
        dactive, ddown = torch.empty_like(active), torch.empty_like(down)
        for e, (a, b) in ctx.ranges:
            torch.mm(grads[a:b], down[e], out=dactive[a:b])
            torch.mm(grads[a:b].t(), active[a:b], out=ddown[e])
        dhidden, dweight = ctx.kernels.activate_backward(dactive, hidden, weight)
        drows, dgate_up = torch.empty_like(rows), torch.empty_like(gate_up)
        for e, (a, b) in ctx.ranges:
            torch.mm(dhidden[a:b], gate_up[e], out=drows[a:b])
            torch.mm(dhidden[a:b].t(), rows[a:b], out=dgate_up[e])
        dx = ctx.kernels.gather_sum(drows, place)
        return dx, dweight[place], None, dgate_up.float(), ddown.float()


def _loss(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row, and the gradient of their weighted sum to the logits."""
    logp = torch.log_softmax(logits.float(), -1)
    loss = -logp.gather(1, targets[:, None]).squeeze(1)
    hit = torch.arange(logits.shape[1]) == targets[:, None]
    return loss, ((logp.exp() - hit.float()) * weights[:, None]).to(logits.dtype)


class CrossEntropy(torch.autograd.Function):
    """(weighted sum of the losses, each row's loss) of hidden [N, d] with head [V, d]: the gradients are made at once,
    so that logits exist for CHUNK rows at a time. N must be a multiple of CHUNK."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, kernels: Any):
        matrix = head.to(hidden.dtype)
        dhidden, dhead = torch.empty_like(hidden), torch.zeros_like(head)
        losses = []
        for a in range(0, len(hidden), CHUNK):
            part = slice(a, a + CHUNK)
            loss, grad = kernels.loss(hidden[part] @ matrix.t(), targets[part], weights[part])
            losses.append(loss)
            if ctx.needs_input_grad[0]:
                torch.mm(grad, matrix, out=dhidden[part])
            if ctx.needs_input_grad[1]:
                dhead += grad.t() @ hidden[part]
        ctx.save_for_backward(dhidden, dhead)
        each = torch.cat(losses)
        ctx.mark_non_differentiable(each)
        return (each * weights).sum(), each

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        dhidden, dhead = ctx.saved_tensors
        return dhidden * grad, dhead * grad, None, None, None
