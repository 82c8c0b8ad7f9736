"""The MTP layer of training against the one that serves, from a checkpoint that was exported in fp32."""

import torch
from training import VOCAB, spans_of, training_config

from hetero_glm5.demo.tokenizer import build_tokenizer
from hetero_glm5.demo.training.export import export
from hetero_glm5.demo.training.forward import Forward
from hetero_glm5.demo.training.model import Demo, mtp_hidden
from hetero_glm5.model.glm5 import GLM5
from hetero_glm5.model.mtp import MTP
from hetero_glm5.model.state import Cache, Rows, Segment
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops
from hetero_glm5.weights.checkpoint import Checkpoint
from hetero_glm5.weights.expert_source import read_expert
from hetero_glm5.weights.load import ModelWeights


def test_the_mtp_layer_is_the_one_that_serves(tmp_path):
    config, T = training_config(index_topk=64), 40
    demo = Demo(config, seed=0)
    demo.mtp.layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
    for norm in (demo.mtp.enorm, demo.mtp.hnorm, demo.mtp.shared_head["norm"]):
        torch.nn.init.normal_(norm.weight, 1, 0.2)
    build_tokenizer(VOCAB).save(str(tmp_path / "tokenizer.json"))
    folder = tmp_path / "model"
    export(demo.state_dict(), config, tmp_path / "tokenizer.json", folder, torch.float32)

    hidden, tokens = torch.randn(T, config["hidden_size"]), torch.randint(0, VOCAB, (T,))
    spans, positions = spans_of(T)
    forward = Forward(demo.trunk.config, compiled=False, dtype=torch.float32)
    with torch.no_grad():
        got = mtp_hidden(forward, demo, hidden, (tokens, positions), spans)

    model, checkpoint = ModelConfig.load(folder), Checkpoint(folder)
    weights = ModelWeights(model, str(folder), mtp=True).getter(torch.float32, "cpu")

    def experts(layer, x, topk_ids, topk_weights, clock):
        y = ops.experts(x, topk_ids, topk_weights, lambda e: read_expert(checkpoint, layer, e)[:3])
        return lambda: y

    cache = Cache.allocate(model, 64, dtype="float32", device="cpu", mtp=True)
    rows = Rows(tokens, positions, torch.arange(T), [Segment(0, T, torch.arange(T))])
    want = MTP(GLM5(model, weights), weights).forward(hidden, rows, cache, experts)
    assert want.abs().max() > 1
    assert (got - want).abs().max() < 5e-5
