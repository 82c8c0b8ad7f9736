import json
from functools import reduce

import pytest
from int4 import KINDS, quantization_config
from shapes import GLM5

from hetero_glm5.demo.configs import tiny_config
from hetero_glm5.flags import ConfigError
from hetero_glm5.model_config import Int4Scheme, ModelConfig, int4_scheme

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


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_int4_in_groups_is_read(tmp_path, kind, group):
    data = tiny_config(quantization_config=quantization_config(kind, group))
    ModelConfig.parse(data)
    assert int4_scheme(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert int4_scheme(tmp_path) == Int4Scheme(kind.removesuffix("_v2"), group, 7 if kind == "gptq" else 8)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert int4_scheme(tmp_path) is None


WEIGHTS = "config_groups group_0 weights "
REFUSED_INT4 = [
    (KINDS[0], "format", "int-quantized", "int-quantized.*only .pack-quantized. is"),
    (KINDS[0], "format", "nvfp4-pack-quantized", "nvfp4"),
    (KINDS[0], "config_groups", None, "config_groups is None"),
    (KINDS[0], "config_groups", {}, "group_0 is None"),
    (KINDS[0], "kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
    (KINDS[0], "transform_config", {"config_groups": {}}, "transform_config"),
    (KINDS[0], "config_groups group_0 input_activations", {"num_bits": 8}, "input_activations"),
    (KINDS[0], "config_groups group_0 output_activations", {"num_bits": 8}, "output_activations"),
    (KINDS[0], "config_groups group_0 format", "float-quantized", "group_0: .format. is .float-quantized"),
    (KINDS[0], WEIGHTS.strip(), None, "group_0: weights is None"),
    (KINDS[0], WEIGHTS + "num_bits", 8, "num_bits. is 8; only 4"),
    (KINDS[0], WEIGHTS + "type", "float", "float"),
    (KINDS[0], WEIGHTS + "symmetric", False, "symmetric. is false; only true"),
    (KINDS[0], WEIGHTS + "strategy", "channel", "channel.*only .group."),
    (KINDS[0], WEIGHTS + "group_size", 16, "group_size. is 16; only 32 or 64 or 128"),
    (KINDS[0], WEIGHTS + "actorder", "group", "actorder. is .group"),
    ("gptq", "bits", 8, "bits. is 8; only 4"),
    ("gptq", "bits", None, "bits. is null"),
    ("gptq", "sym", False, "sym. is false"),
    ("gptq", "sym", 1, "sym. is 1"),
    ("gptq", "group_size", 128.0, "group_size. is 128.0"),
    ("gptq", "group_size", -1, "group_size. is -1"),
    ("gptq", "desc_act", "yes", "desc_act"),
    ("gptq", "pack_dtype", "int8", "pack_dtype"),
    ("gptq", "checkpoint_format", "marlin", "marlin.*only .gptq. or .gptq_v2."),
]


@pytest.mark.parametrize(("kind", "path", "value", "words"), REFUSED_INT4)
def test_other_integer_weights_are_refused_with_what_can_be_read(kind, path, value, words):
    config = quantization_config(kind, 32)
    *outer, key = path.split()
    reduce(dict.__getitem__, outer, config)[key] = value
    with pytest.raises(ConfigError, match=f"config.json: quantization_config.*{words}") as error:
        ModelConfig.parse(tiny_config(quantization_config=config))
    message = str(error.value)
    assert "\n" not in message
    if "desc_act" not in words:  # of the wrong type
        assert "symmetric INT4 in groups of 32, 64 or 128" in message and "hetero-glm5 quantize" in message


def test_groups_of_two_sizes_are_refused():
    config = quantization_config(KINDS[0], 32)
    config["config_groups"]["group_1"] = quantization_config(KINDS[0], 128)["config_groups"]["group_0"]
    with pytest.raises(ConfigError, match="group_size. is 32 and 128; one is supported"):
        ModelConfig.parse(tiny_config(quantization_config=config))


def test_either_key_names_the_version_of_gptq(tmp_path):
    config = quantization_config("gptq_v2", 32)
    config["format"] = config.pop("checkpoint_format")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert int4_scheme(tmp_path).stored_zero == 8
