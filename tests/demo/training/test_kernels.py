import pytest
import torch
import torch.nn.functional as F
from training import spans_of

from hetero_glm5.demo.training.kernels import BLOCK, CHUNK, Attend, CrossEntropy, Kernels, RoutedExperts, blocks


def same(got, want, tolerance=1e-5):
    assert want.norm() > 0
    assert (got - want).norm() <= tolerance * want.norm()


def test_blocks_cover_a_document():
    for length in (1, BLOCK, BLOCK + 1, 5 * BLOCK // 2, 4000):
        parts = blocks(7, 7 + length)
        assert parts[0][0] == 7 and parts[-1][1] == 7 + length
        assert all(a[1] == b[0] for a, b in zip(parts, parts[1:], strict=False))
        assert max(b - a for a, b in parts) <= 1.5 * BLOCK


def test_attention_is_causal_within_documents():
    spans, _ = spans_of(3, 700, 40)
    q, k = (torch.randn(2, 743, 16, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 743, 8, requires_grad=True)
    got = Attend.apply(q, k, v, spans)
    want = torch.cat(
        [F.scaled_dot_product_attention(*(t[:, a:b] for t in (q, k, v)), is_causal=True, scale=1.0) for a, b in spans],
        1,
    )
    same(got, want)
    direction = torch.randn_like(want)
    gradients = [torch.autograd.grad((out * direction).sum(), (q, k, v)) for out in (got, want)]
    for mine, theirs in zip(*gradients, strict=True):
        same(mine, theirs)


def test_routed_experts_with_one_that_nobody_chooses():
    x, gate_up, down = torch.randn(50, 16), torch.randn(4, 24, 16), torch.randn(4, 16, 12)
    chosen = torch.stack([torch.randperm(3)[:2] for _ in range(50)])
    weights = torch.rand(50, 2)
    inputs = [t.requires_grad_() for t in (x, weights, gate_up, down)]
    want = torch.zeros(50, 16)
    for slot in range(2):
        gate, up = torch.einsum("td,tnd->tn", x, gate_up[chosen[:, slot]]).chunk(2, -1)
        out = torch.einsum("tn,tdn->td", F.silu(gate) * up, down[chosen[:, slot]])
        want = want + weights[:, slot, None] * out
    got = RoutedExperts.apply(x, weights, (chosen, Kernels(False)), gate_up, down)
    same(got, want)
    direction = torch.randn_like(want)
    gradients = [torch.autograd.grad((out * direction).sum(), inputs) for out in (got, want)]
    for mine, theirs in zip(*gradients, strict=True):
        same(mine, theirs)


@pytest.mark.parametrize("frozen", [False, True])
def test_cross_entropy(frozen):
    hidden = torch.randn(2 * CHUNK, 8, requires_grad=True)
    head = torch.randn(30, 8, requires_grad=not frozen)
    targets, weights = torch.randint(0, 30, (2 * CHUNK,)), torch.rand(2 * CHUNK)
    loss, each = CrossEntropy.apply(hidden, head, targets, weights, Kernels(False))
    want = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    same(each, want)
    inputs = (hidden,) if frozen else (hidden, head)
    gradients = [torch.autograd.grad(2 * out, inputs) for out in (loss, (want * weights).sum())]
    for mine, theirs in zip(*gradients, strict=True):
        same(mine, theirs)
