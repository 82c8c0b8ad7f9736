from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import tiny_checkpoint

from hetero_glm5.core import UserError
from hetero_glm5.demo.random_checkpoint import serve_config, tiny_config, write_checkpoint
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.names import expected_tensors, scale_shape
from hetero_glm5.weights.quantize import quantize_fp8

SMALL = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return tensors


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_same_arguments_same_bytes_in_another_process(tmp_path):
    write_checkpoint(tmp_path / "a", tiny_config(**SMALL), dtype="float32")
    script = (
        "from hetero_glm5.demo.random_checkpoint import tiny_config, write_checkpoint;"
        f"write_checkpoint({str(tmp_path / 'b')!r}, tiny_config(**{SMALL}), dtype='float32')"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    write_checkpoint(tmp_path / "c", tiny_config(**SMALL), dtype="float32", seed=1)
    assert digest(tmp_path / "a")["model.safetensors"] != digest(tmp_path / "c")["model.safetensors"]


@pytest.mark.parametrize("overrides", [{}, {"num_hidden_layers": 9, "index_topk_freq": 4, "index_skip_topk_offset": 3}])
def test_holds_exactly_the_expected_tensors(checkpoints, overrides):
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", **overrides)
    expected = expected_tensors(ModelConfig.load(folder), mtp=True)
    tensors = read(folder)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {k: v.shape for k, v in expected.items()}
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if expected[name].dtypes == ("F32",) else torch.bfloat16), name


def test_no_mtp_layer_without_nextn(tmp_path):
    write_checkpoint(tmp_path / "m", tiny_config(**SMALL, num_nextn_predict_layers=0))
    assert not any(name.startswith("model.layers.2.") for name in read(tmp_path / "m"))


def test_shards_are_bounded_and_change_no_weight(tmp_path):
    limit = 600_000
    one = write_checkpoint(tmp_path / "one", tiny_config(**SMALL))
    many = write_checkpoint(tmp_path / "many", tiny_config(**SMALL), shard_bytes=limit)
    assert not (one / "model.safetensors.index.json").exists()
    index = json.loads((many / "model.safetensors.index.json").read_text())
    whole, parts = read(one), read(many)
    assert whole.keys() == parts.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in parts.values())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        with safe_open(many / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
        assert (many / file).stat().st_size < limit + 20_000


def test_weights_are_not_trivial(checkpoints):
    tensors = read(tiny_checkpoint(checkpoints))
    bias = tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert 6.7 < bias.mean() < 7.1 and bias.std() > 0.02
    assert len(bias.bfloat16().unique()) < len(bias.unique())  # so that rounding it shows
    assert tensors["model.layers.0.self_attn.indexer.k_norm.bias"].abs().min() > 0
    assert tensors["model.norm.weight"].std() > 0.1
    experts = [tensors[f"model.layers.2.mlp.experts.{e}.up_proj.weight"] for e in (0, 1)]
    assert not torch.equal(*experts)


def test_a_repeated_block_leaves_no_two_rows_alike(tmp_path):
    folder = write_checkpoint(tmp_path / "wide", tiny_config(**SMALL, vocab_size=6000, num_nextn_predict_layers=0))
    assert len(read(folder)["lm_head.weight"].unique(dim=0)) == 6000


def test_fp8_has_scales_where_glm5_has_them(checkpoints):
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", fp8=True, kv_lora_rank=100)  # 132 rows: a ragged block
    config = ModelConfig.load(folder)
    tensors = read(folder)
    for name, spec in expected_tensors(config, mtp=True).items():
        assert (f"{name}_scale_inv" in tensors) == spec.quantised, name
        if spec.quantised:
            assert tensors[name].dtype == torch.float8_e4m3fn
            assert tensors[f"{name}_scale_inv"].dtype == torch.float32
            assert tuple(tensors[f"{name}_scale_inv"].shape) == scale_shape(spec.shape)
    kept = json.loads((folder / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {"lm_head", "model.norm", "model.layers.2.mlp.gate", "model.layers.5.eh_proj"} <= set(kept)
    assert "model.layers.0.self_attn.indexers_proj" in kept
    assert "model.layers.0.self_attn.indexer.wk" not in kept


def test_fp8_blocks_follow_the_definition():
    weight = torch.randn(130, 300, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_fp8(weight)
    assert scale.shape == (2, 3)
    for row in range(2):
        for column in range(3):
            block = weight[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
            stored = codes[128 * row : 128 * row + 128, 128 * column : 128 * column + 128].float()
            assert stored.abs().max() == 448
            # E4M3 has 3 mantissa bits, so a normal number is off by at most 1/16, a subnormal by half of 2**-9
            error = (stored * scale[row, column] - block).abs()
            assert (error <= (block.abs() / 16).clamp(min=scale[row, column] * 2**-10) * 1.0001).all()


def test_refusals(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        write_checkpoint(tmp_path / "full", tiny_config())
    with pytest.raises(UserError, match="at least 292"):
        write_checkpoint(tmp_path / "small", tiny_config(vocab_size=256))
    with pytest.raises(UserError, match="hidden_size"):
        write_checkpoint(tmp_path / "small", {**tiny_config(), "hidden_size": None})
    assert not (tmp_path / "small").exists()


def test_a_configs_own_quantization_is_replaced(tmp_path):
    config = tiny_config(**SMALL, quantization_config={"quant_method": "fp8", "fmt": "e4m3"})
    folder = write_checkpoint(tmp_path / "plain", config)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_served_model_suits_the_cards_command():
    config = ModelConfig.parse(serve_config() | {"eos_token_id": [0]})
    assert config.n_routed_experts > 30
    assert config.max_position_embeddings >= 8192 and config.index_topk <= 1024
    assert set(config.indexer_types) == {"full"}


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "hetero_glm5.demo.random_checkpoint", str(tmp_path / "out")]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config(**SMALL)))
    done = subprocess.run(
        [*command, "--config", str(config), "--seed", "3"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("wrote ")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "not an empty folder" in again.stderr and "Traceback" not in again.stderr
    config.write_text("{")
    broken = subprocess.run(
        [*command[:-1], str(tmp_path / "new"), "--config", str(config)], capture_output=True, text=True
    )
    assert broken.returncode == 1 and "no valid JSON" in broken.stderr and "Traceback" not in broken.stderr


@pytest.mark.parametrize("overrides", [{}, {"num_hidden_layers": 9, "index_topk_freq": 4, "index_skip_topk_offset": 3}])
def test_loads_in_the_oracle(checkpoints, overrides):
    from transformers import GlmMoeDsaForCausalLM

    folder = tiny_checkpoint(checkpoints, **overrides)
    model, info = GlmMoeDsaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    mtp = f"model.layers.{model.config.num_hidden_layers}."
    assert all(name.startswith(mtp) for name in info["unexpected_keys"])
    with torch.no_grad():
        logits = model(torch.arange(1, 49)[None]).logits
    assert logits.isfinite().all()
    assert 1 < logits.std() < 4  # lively: greedy choices are not near-ties of noise
    assert len(logits.argmax(-1).unique()) > 24
