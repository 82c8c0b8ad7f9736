import json

import pytest
from shapes import GLM5

from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.flags import ConfigError
from hetero_glm5.model_config import ModelConfig

GLM52_FULL_LAYERS = [0, 1, 2, *range(6, 75, 4)]


def full_layers(config: dict) -> list[int]:
    return [i for i, kind in enumerate(ModelConfig.parse(config).indexer_types) if kind == "full"]


def test_glm5_and_its_variants():
    config = ModelConfig.parse(GLM5)
    assert config.moe_layers == tuple(range(3, 78)) and full_layers(GLM5) == list(range(78))
    assert config.qk_head_dim == 256 and config.softmax_scale == 1 / 16 and config.latent_dim == 576
    assert config.is_sparse(78) and config.has_indexer(78)
    glm52 = GLM5 | {"index_topk_freq": 4, "index_skip_topk_offset": 3, "index_topk_pattern": None}
    assert full_layers(glm52) == GLM52_FULL_LAYERS


def test_index_share_precedence():
    tiny = tiny_config(num_hidden_layers=4, index_topk_freq=2, index_skip_topk_offset=1)
    assert full_layers(tiny) == [0, 2]
    assert full_layers(tiny | {"index_topk_pattern": "FSSF"}) == [0, 3]
    explicit = ["full", "full", "shared", "shared"]
    assert full_layers(tiny | {"index_topk_pattern": "FSSF", "indexer_types": explicit}) == [0, 1]


def test_explicit_mlp_layer_types_win():
    kinds = ["dense", "sparse", "dense", "sparse", "sparse"]
    assert ModelConfig.parse(tiny_config(mlp_layer_types=kinds)).moe_layers == (1, 3, 4)


@pytest.mark.parametrize("key", ["hidden_size", "index_topk", "rms_norm_eps", "vocab_size", "first_k_dense_replace"])
def test_a_missing_key_is_named(key):
    data = tiny_config()
    del data[key]
    with pytest.raises(ConfigError, match=key):
        ModelConfig.parse(data)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model_type": "deepseek_v3"}, "deepseek_v3"),
        ({"scoring_func": "softmax"}, "softmax.*sigmoid"),
        ({"attention_bias": True}, "attention_bias.*true"),
        ({"hidden_size": "256"}, "hidden_size.*'256'"),
        ({"hidden_size": True}, "hidden_size.*True"),
        ({"hidden_size": 0}, "hidden_size.*between 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"qk_rope_head_dim": 33}, "even"),
        ({"index_head_dim": 16}, "index_head_dim 16"),
        ({"n_group": 3}, "n_group 3"),
        ({"n_group": 4, "topk_group": 5}, "topk_group 5"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 5}, "num_experts_per_tok 5"),
        ({"indexer_types": ["shared"] * 5}, "first layer"),
        ({"indexer_types": ["full"] * 4}, "5 of full, shared"),
        ({"index_topk_pattern": "FFXFF"}, "index_topk_pattern"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling"),
        ({"rope_parameters": "x"}, "rope_parameters is 'x'"),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 2}}, "factor"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": [1]}, r"quantization_config is \[1\]"),
        ({"index_topk_pattern": 5}, "index_topk_pattern"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"num_hidden_layers": 10**6, "indexer_types": None}, "1000000 layers.*at most 1000"),
        ({"n_routed_experts": 10**8}, "100000000 experts"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": [5000]}, "5000 lies outside the vocabulary of 512"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"eos_token_id": "x"}, "eos_token_id"),
    ],
)
def test_an_unsupported_value_is_one_sentence(overrides, words):
    with pytest.raises(ConfigError, match=words) as error:
        ModelConfig.parse(tiny_config(**overrides))
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_end_tokens_come_from_both_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(eos_token_id=[5, 3])))
    assert ModelConfig.load(tmp_path).eos_token_ids == (5, 3)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 9]}))
    assert ModelConfig.load(tmp_path).eos_token_ids == (3, 5, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ConfigError, match="eos_token_id"):
        ModelConfig.load(tmp_path)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match="not a checkpoint"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="no valid JSON"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match="no valid JSON"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="list"):
        ModelConfig.load(tmp_path)
