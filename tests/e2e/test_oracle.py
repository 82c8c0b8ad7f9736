"""fp32 logits of the whole engine against transformers: max |Δ| ≤ 1e-4 on logits of a few units."""

import dataclasses
import json

import pytest
import torch
from oracle import LATENT_EPS, oracle, oracle_logits, random_ids
from safetensors.torch import save_file
from tiny import tiny_checkpoint

from hetero_glm5.core import SamplingParams
from hetero_glm5.llm import LLM
from hetero_glm5.model.glm5 import GLM5
from hetero_glm5.model.mtp import MTP
from hetero_glm5.model.state import Cache, Rows, Segment
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.ops import reference as ops
from hetero_glm5.weights.checkpoint import Checkpoint
from hetero_glm5.weights.expert_source import read_expert
from hetero_glm5.weights.load import ModelWeights
from hetero_glm5.weights.names import SCALE_SUFFIX

TOLERANCE = 1e-4
EXACT = {
    "device": "cpu",
    "dtype": "float32",
    "latent_norm_eps": LATENT_EPS,
    "skip_tokenizer": True,
    "max_total_tokens": 512,
    "page_size": 8,
}

MODELS = {
    "glm5.md 8": {},
    "topk above the length": {"index_topk": 64},
    "IndexShare": {"num_hidden_layers": 9, "index_topk_freq": 4, "index_skip_topk_offset": 3},
    "groups": {"n_group": 4, "topk_group": 2},
    "weights not normalised": {"norm_topk_prob": False},
    "odd dimensions": {
        "hidden_size": 250,
        "intermediate_size": 301,
        "moe_intermediate_size": 77,
        "q_lora_rank": 99,
        "kv_lora_rank": 53,
        "qk_nope_head_dim": 37,
        "qk_rope_head_dim": 22,
        "v_head_dim": 41,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "index_n_heads": 19,
        "index_head_dim": 45,
        "n_routed_experts": 13,
        "num_experts_per_tok": 3,
        "vocab_size": 509,
    },
}


def difference(llm: LLM, folder, token_ids) -> float:
    want = oracle_logits(folder, token_ids)
    assert want.abs().max() > 1, "logits too small to tell"
    return (llm.logits(token_ids) - want).abs().max().item()


@pytest.mark.parametrize("name", MODELS)
def test_prefill(checkpoints, name):
    folder = tiny_checkpoint(checkpoints, **MODELS[name])
    with LLM(folder, **EXACT) as llm:
        assert difference(llm, folder, random_ids(50)) <= TOLERANCE


def test_selection_is_what_is_tested(checkpoints):
    """With index_topk below the length, dense attention must give other logits."""
    folder = tiny_checkpoint(checkpoints)
    dense = tiny_checkpoint(checkpoints, index_topk=64)
    ids = random_ids(50)
    assert (oracle_logits(folder, ids) - oracle_logits(dense, ids)).abs().max() > 100 * TOLERANCE


def test_every_chunk_size(checkpoints):
    folder = tiny_checkpoint(checkpoints)
    ids = random_ids(37)
    want = oracle_logits(folder, ids)
    for chunk in range(1, len(ids) + 1):
        with LLM(folder, chunked_prefill_size=chunk, **EXACT) as llm:
            assert (llm.logits(ids) - want).abs().max() <= TOLERANCE, f"chunk {chunk}"


@pytest.mark.parametrize("name", ["glm5.md 8", "IndexShare"])
def test_prefill_then_decode_token_by_token(checkpoints, name):
    """Each decoded token's logits are the oracle's for the sequence so far: a prompt of 20 tokens and 40 more."""
    folder = tiny_checkpoint(checkpoints, **MODELS[name])
    with LLM(folder, **EXACT) as llm:
        greedy = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        seq = llm.engine.add(random_ids(20), greedy, logits=True)
        while not seq.finished:
            llm.engine.step()
        got = torch.cat(seq.logits)
        assert got.shape[0] == 59
        want = oracle_logits(folder, seq.tokens[:-1])
        assert (got - want).abs().max() <= TOLERANCE
        assert want[19:].argmax(-1).tolist() == seq.output


def test_a_ragged_fp8_checkpoint(checkpoints, tmp_path):
    """Dimensions that are no multiples of 128, so that blocks are ragged in both directions. transformers cannot read
    such a checkpoint, so the oracle reads its dequantised copy."""
    folder = tiny_checkpoint(checkpoints, fp8=True, **MODELS["odd dimensions"])
    source = Checkpoint(folder)
    plain = {name: source.read(name, torch.float32) for name in source.entries if not name.endswith(SCALE_SUFFIX)}
    assert any(source.is_fp8(name) for name in plain)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    save_file(plain, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    with LLM(folder, **EXACT) as llm:
        assert difference(llm, tmp_path, random_ids(50)) <= TOLERANCE


def test_bf16_agrees_where_nothing_is_chosen_closely(checkpoints):
    """In bf16 the logits differ by rounding. A selection or a routing that flips makes more of it, so here attention is
    dense and every expert is chosen. Experts on either tier."""
    overrides = {"index_topk": 64, "num_experts_per_tok": 16}
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", **overrides)
    ids = random_ids(50)
    want = oracle_logits(folder, ids)
    for on_device in (0, 7, 16):
        with LLM(folder, **EXACT | {"dtype": "bfloat16"}, kt_num_gpu_experts=on_device) as llm:
            got = llm.logits(ids)
        assert ((got - want).norm() / want.norm()) < 0.02, on_device
        assert (got.argmax(-1) == want.argmax(-1)).float().mean() >= 0.94, on_device


def test_fp8_experts_are_their_dequantised_selves(checkpoints):
    """Experts kept in FP8 on the host, unpacked on the device, or upcast to FP32 when packed: the same model."""
    folder = tiny_checkpoint(checkpoints, fp8=True, index_topk=64, num_experts_per_tok=16)
    ids = random_ids(50)
    with LLM(folder, **EXACT) as llm:
        want = llm.logits(ids)
    for on_device in (0, 7, 16):
        with LLM(folder, **EXACT, kt_method="FP8", kt_num_gpu_experts=on_device) as llm:
            assert llm.engine.config.kt_method == "FP8"
            got = llm.logits(ids)
        assert ((got - want).norm() / want.norm()) < 0.01, on_device  # the host rounds activations to bf16


def test_the_method_follows_the_experts_wherever_they_come_from(checkpoints):
    """--kt-weight-path may be FP8 where --model is not, and the other way round."""
    plain, fp8 = tiny_checkpoint(checkpoints), tiny_checkpoint(checkpoints, fp8=True)
    for model, experts, method in ((plain, fp8, "FP8"), (fp8, plain, "BF16")):
        with LLM(model, **EXACT | {"dtype": "bfloat16"}, kt_weight_path=str(experts)) as llm:
            assert llm.engine.config.kt_method == method
            assert llm.logits(random_ids(20)).isfinite().all()


@pytest.mark.parametrize(("method", "error"), [("INT8", 0.01), ("INT4", 0.07)])
def test_integer_experts_are_near_the_bf16_model(checkpoints, method, error):
    """On the host, on the device and divided between them. The device computes from the same codes in fp32, so
    the placements differ among themselves by the rounding of inputs only."""
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", index_topk=64, num_experts_per_tok=16)
    ids = random_ids(50)
    with LLM(folder, **EXACT, kt_method="BF16") as llm:
        want = llm.logits(ids)
    got = []
    for on_device in (0, 7, 16):
        with LLM(folder, **EXACT, kt_method=method, kt_num_gpu_experts=on_device) as llm:
            assert llm.engine.config.kt_method == method
            got.append(llm.logits(ids))
        assert ((got[-1] - want).norm() / want.norm()) < error, on_device
    assert (got[0] - got[2]).norm() / want.norm() < 0.012


def test_the_mtp_layer(checkpoints):
    """transformers has no MTP: its model with one layer more holds layer N, which gets z made by hand."""
    folder = tiny_checkpoint(checkpoints)
    config = dataclasses.replace(ModelConfig.load(folder), latent_norm_eps=LATENT_EPS)
    n, T = config.num_hidden_layers, 40
    reference = oracle(
        folder,
        num_hidden_layers=n + 1,
        indexer_types=["full"] * (n + 1),
        mlp_layer_types=[*config.mlp_layer_types, "sparse"],
        layer_types=["indexed_attention"] * (n + 1),
    )
    hidden, ids = torch.randn(T, config.hidden_size), torch.tensor(random_ids(T))
    read = Checkpoint(folder).read

    def norm(x, name):
        weight = read(name, torch.float32)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    with torch.no_grad():
        embedded = reference.model.embed_tokens(ids)
        prefix = f"model.layers.{n}."
        z = torch.cat((norm(embedded, f"{prefix}enorm.weight"), norm(hidden, f"{prefix}hnorm.weight")), -1)
        z = (z @ read(f"{prefix}eh_proj.weight", torch.float32).T)[None]
        positions = torch.arange(T)[None]
        mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
        layer = reference.model.layers[n]
        out = layer(
            z,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=reference.model.rotary_emb(z, positions),
        )
        out = out[0] if isinstance(out, tuple) else out
        want = norm(out.view(T, -1), f"{prefix}shared_head.norm.weight") @ reference.lm_head.weight.T

    source, checkpoint = ModelWeights(config, str(folder), mtp=True), Checkpoint(folder)
    weights = source.getter(torch.float32, "cpu")
    mtp = MTP(GLM5(config, weights), weights)

    def experts(layer, x, topk_ids, topk_weights, clock):
        y = ops.experts(x, topk_ids, topk_weights, lambda e: read_expert(checkpoint, layer, e)[:3])
        return lambda: y

    cache = Cache.allocate(config, 64, dtype="float32", device="cpu", mtp=True)
    for chunk in (T, 7):
        got = []
        for a in range(0, T, chunk):
            b = min(a + chunk, T)
            rows = Rows(ids[a:b], torch.arange(a, b), torch.arange(a, b), [Segment(0, b - a, torch.arange(b))])
            got.append(mtp.model.logits(mtp.forward(hidden[a:b], rows, cache, experts)))
        assert (torch.cat(got) - want).abs().max() <= TOLERANCE
