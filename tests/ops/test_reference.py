import math

import pytest
import torch

from hetero_glm5.ops import reference as ops


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


def reader(context):
    return lambda slots: context[slots]


def test_rope_rotates_neighbouring_pairs():
    x, positions, theta = normal(5, 3, 8), torch.tensor([0, 1, 7, 100, 200_000]), 1e6
    turned = ops.rope(x, ops.rotations(positions, 8, theta))
    for t, p in enumerate(positions.tolist()):
        for j in range(4):
            angle = p * theta ** (-2 * j / 8)
            for h in range(3):
                pair = torch.view_as_complex(x[t, h, 2 * j : 2 * j + 2].double())
                want = pair * complex(math.cos(angle), math.sin(angle))
                got = torch.view_as_complex(turned[t, h, 2 * j : 2 * j + 2].double())
                assert abs(got - want) < 1e-6
    assert torch.equal(turned[0], x[0])
    assert ops.rope(x[:0], ops.rotations(positions[:0], 8, theta)).shape == (0, 3, 8)


def test_norms_against_float64():
    x, w, b = normal(4, 33), normal(33, seed=1), normal(33, seed=2)
    wide = x.double()
    rms = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    torch.testing.assert_close(ops.RMSNorm(w, 1e-5)(x).double(), rms, atol=1e-6, rtol=1e-6)
    layer = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    want = layer * w.double() + b.double()
    torch.testing.assert_close(ops.layer_norm(x, w, b, 1e-6).double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lengths", [(40,), (40, 31, 38)])
def test_selection_is_the_topk_of_the_causal_scores(monkeypatch, lengths):
    B, R, S, topk = len(lengths), 30, 40, 5
    q, w, keys = normal(B, R, 16, 8), normal(B, R, 16, seed=1), normal(B, S, 8, seed=2)
    slots = torch.randperm(B * S, generator=rng()).view(B, S)
    pool = torch.full((B * S + 1, 8), float("nan"))
    pool[slots] = keys
    last = torch.tensor([[length - R + r for r in range(R)] for length in lengths])
    seen = ops.Seen(torch.where(torch.arange(S) < torch.tensor(lengths)[:, None], slots, slots[:, :1]), last)
    chosen = ops.select_slots(q, w, reader(pool), seen, topk)
    scores = (w.double()[..., None] * (q.double() @ keys.double()[:, None].transpose(-1, -2)).relu()).sum(2)
    for i, length in enumerate(lengths):
        for r in range(R):
            p = length - R + r
            want = scores[i, r, : p + 1].topk(min(topk, p + 1)).indices
            got = [s for s in chosen[i, r].tolist() if s >= 0]
            assert sorted(got) == sorted(slots[i][want].tolist())
    monkeypatch.setattr(ops, "BLOCK_ELEMENTS", 1)  # one row at a time
    again = ops.select_slots(q, w, reader(pool), seen, topk)
    assert torch.equal(again.sort().values, chosen.sort().values)


@pytest.mark.parametrize("block", [1, 1 << 24])
def test_absorbed_attention_equals_expanded(monkeypatch, block):
    monkeypatch.setattr(ops, "BLOCK_ELEMENTS", block)
    T, S, H, nope, rope, c, v = 4, 9, 3, 6, 4, 5, 7
    q_nope, q_rope = normal(T, H, nope).double(), normal(T, H, rope, seed=1).double()
    latent, k_rope = normal(S, c, seed=2).double(), normal(S, rope, seed=3).double()
    w_uk, w_uv = normal(H, nope, c, seed=4).double(), normal(H, v, c, seed=5).double()
    positions, scale = torch.arange(S - T, S), (nope + rope) ** -0.5

    keys = torch.cat((torch.einsum("hnc,sc->shn", w_uk, latent), k_rope[:, None].expand(S, H, rope)), -1)
    scores = torch.einsum("thd,shd->ths", torch.cat((q_nope, q_rope), -1), keys) * scale
    scores = scores.masked_fill(torch.arange(S) > positions[:, None, None], float("-inf"))
    want = torch.einsum("ths,hvc,sc->thv", scores.softmax(-1), w_uv, latent)

    absorbed = torch.cat((torch.einsum("thn,hnc->thc", q_nope, w_uk), q_rope), -1).float()
    context = torch.cat((latent, k_rope), -1).float()
    hidden = torch.arange(S) > positions[:, None]
    everything = torch.where(hidden, -1, torch.arange(S))
    for mixed in (
        ops.attend_dense(absorbed[None], reader(context), ops.Seen(torch.arange(S)[None], positions[None]), scale, c)[
            0
        ],
        ops.attend_selected(absorbed, reader(context), everything, scale, c),
    ):
        got = torch.einsum("thc,hvc->thv", mixed.double(), w_uv)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_unselected_positions_do_not_matter():
    q, context = normal(2, 3, 6), normal(8, 6, seed=1)
    selection = torch.tensor([[-1, 3, -1], [7, 2, 4]])
    want = ops.attend_selected(q, reader(context), selection, 0.5, 4)
    context[[0, 1, 5, 6]] = float("nan")
    assert torch.equal(ops.attend_selected(q, reader(context), selection, 0.5, 4), want)


def route_by_loop(logits, bias, topk, groups, scale, normalise):
    ids, weights = [], []
    for row in logits.double():
        gate = [1 / (1 + math.exp(-v)) for v in row.tolist()]
        choice = [g + b for g, b in zip(gate, bias.double().tolist(), strict=True)]
        n_group, topk_group = groups
        size = len(gate) // n_group
        group_score = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
        kept = sorted(range(n_group), key=lambda g: -group_score[g])[:topk_group]
        allowed = [e for e in range(len(gate)) if e // size in kept]
        best = sorted(allowed, key=lambda e: -choice[e])[:topk]
        total = sum(gate[e] for e in best) + 1e-20 if normalise else 1
        ids.append(best)
        weights.append([gate[e] / total * scale for e in best])
    return torch.tensor(ids), torch.tensor(weights)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 8)])
@pytest.mark.parametrize("normalise", [True, False])
def test_router_against_a_loop(groups, normalise):
    logits, bias = normal(20, 32), 6.9 + 0.1 * normal(32, seed=1)
    want = route_by_loop(logits, bias, 4, groups, 2.5, normalise)
    got = ops.route(logits, bias, topk=4, groups=groups, scale=2.5, normalise=normalise)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], check_dtype=False)


def test_experts_sum_only_their_own_rows():
    x, ids = normal(5, 8), torch.tensor([[0, 2], [2, -1], [-1, -1], [1, 1], [2, 0]])
    weights = normal(5, 2, seed=1)
    matrices = [(normal(6, 8, seed=10 + e), normal(6, 8, seed=20 + e), normal(8, 6, seed=30 + e)) for e in range(3)]
    y = ops.experts(x, ids, weights, lambda e: matrices[e])
    want = torch.zeros(5, 8)
    for t in range(5):
        for k in range(2):
            if ids[t, k] >= 0:
                want[t] += weights[t, k] * ops.swiglu(x[t : t + 1], *matrices[ids[t, k]])[0]
    torch.testing.assert_close(y, want)
