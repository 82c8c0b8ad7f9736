import json

import pytest
import torch
from oracle import oracle_logits, random_ids
from safetensors import safe_open
from training import VOCAB, training_config

from hetero_glm5.core import UserError
from hetero_glm5.demo.tokenizer import build_tokenizer
from hetero_glm5.demo.training.export import export
from hetero_glm5.demo.training.model import Demo
from hetero_glm5.llm import LLM


@pytest.fixture
def tokenizer(tmp_path):
    build_tokenizer(VOCAB).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_the_same_logits_everywhere(tmp_path, tokenizer):
    """transformers and this project load what is exported, and agree with what was trained."""
    config = training_config()
    demo, folder, ids = Demo(config, seed=0), tmp_path / "model", random_ids(50, VOCAB)
    demo.trunk.lm_head.weight.data *= 20
    for layer in demo.trunk.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
    export(demo.state_dict(), config, tokenizer, folder, torch.float32)
    with torch.no_grad():
        want = demo.trunk(torch.tensor([ids])).logits[0]
    assert want.abs().max() > 1
    assert (oracle_logits(folder, ids) - want).abs().max() < 1e-5
    options = {"device": "cpu", "dtype": "float32", "max_total_tokens": 256, "page_size": 8}
    with LLM(folder, **options) as llm:
        assert (llm.logits(ids) - want).abs().max() < 1e-4


def test_types_on_disk(tmp_path, tokenizer):
    config = training_config()
    export(Demo(config, seed=0).state_dict(), config, tokenizer, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        types = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    full = {name for name, dtype in types.items() if dtype == torch.float32}
    assert full == {name for name in types if name.endswith("e_score_correction_bias")} and len(full) == 3
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_state_of_another_model_is_refused(tmp_path, tokenizer):
    config = training_config()
    state = Demo(config, seed=0).state_dict()
    with pytest.raises(UserError, match="missing"):
        export(state, config | {"num_hidden_layers": 4}, tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="is expected"):
        export(state, config | {"intermediate_size": 128}, tokenizer, tmp_path / "model")
