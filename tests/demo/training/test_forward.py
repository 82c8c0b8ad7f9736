"""The forward and backward pass of training against transformers' own, in fp32."""

import pytest
import torch
from training import VOCAB, spans_of, training_config

from hetero_glm5.demo.training.forward import Forward
from hetero_glm5.demo.training.model import Demo
from hetero_glm5.demo.training.stages import Watch

SPANS, POSITIONS = spans_of(20, 45, 7)


@pytest.fixture
def demo():
    demo = Demo(training_config(index_topk=100), seed=0)
    for layer in demo.trunk.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
    return demo


def test_states_and_gradients_are_those_of_transformers(demo):
    """Documents in one row of tokens, against each by itself."""
    tokens = torch.randint(0, VOCAB, (len(POSITIONS),))
    model, parameters = demo.trunk.model, dict(demo.trunk.model.named_parameters())
    got = Forward(demo.trunk.config, compiled=False, dtype=torch.float32).trunk(model, tokens, POSITIONS, SPANS)
    want = torch.cat([model(tokens[None, a:b]).last_hidden_state[0] for a, b in SPANS])
    assert want.abs().max() > 1
    assert (got - want).abs().max() < 2e-5

    direction = torch.randn_like(want)
    trained = [name for name in parameters if "indexer" not in name]
    gradients = [
        torch.autograd.grad((states * direction).sum(), [parameters[name] for name in trained])
        for states in (got, want)
    ]
    for name, mine, theirs in zip(trained, *gradients, strict=True):
        assert theirs.norm() > 0, name
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm(), name


def test_selection_is_that_of_transformers():
    """With index_topk 16 in force, three blocks of queries, a document below it and one above."""
    demo = Demo(training_config(index_topk=16), seed=1)
    spans, positions = spans_of(600, 10)
    tokens = torch.randint(0, VOCAB, (610,))
    modules = [layer.self_attn for layer in demo.trunk.model.layers]
    watch = Watch([], 8, select=modules, learn=[])
    forward = Forward(demo.trunk.config, compiled=False, dtype=torch.float32)
    with torch.no_grad():
        got = forward.trunk(demo.trunk.model, tokens, positions, spans, watch)
        dense = forward.trunk(demo.trunk.model, tokens, positions, spans)
        want = torch.cat([demo.trunk.model(tokens[None, a:b]).last_hidden_state[0] for a, b in spans])
    assert (dense - want).abs().max() > 0.05, "the selection changes nothing"
    assert (got - want).abs().max() < 5e-5


def test_loads_are_counted(demo):
    gates = [layer.mlp.gate for layer in demo.trunk.model.layers[1:]]
    watch = Watch(gates, 8, [], [])
    tokens = torch.randint(0, VOCAB, (len(POSITIONS),))
    Forward(demo.trunk.config, compiled=False).trunk(demo.trunk.model, tokens, POSITIONS, SPANS, watch)
    assert watch.counts.sum(1).tolist() == [2 * len(tokens)] * 2
