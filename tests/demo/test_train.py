import math
import sys

import pytest
from training import write_toy_data

from hetero_glm5.demo.configs import demo_config
from hetero_glm5.demo.train import config_for, main
from hetero_glm5.model_config import ModelConfig
from hetero_glm5.weights.names import expected_tensors


def test_the_model_fits_into_the_package():
    tensors = expected_tensors(ModelConfig.parse(demo_config()), mtp=True)
    assert 2 * sum(math.prod(spec.shape) for spec in tensors.values()) < 24e6


def test_the_tokenizer_decides_about_ids(tmp_path):
    write_toy_data(tmp_path)
    config = config_for(tmp_path)
    assert config["vocab_size"] == 320 and config["pad_token_id"] in config["eos_token_id"]
    assert len(config["eos_token_id"]) == 3


def test_nothing_to_export_is_said(tmp_path, monkeypatch):
    write_toy_data(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path), "--stage", "export"])
    with pytest.raises(SystemExit, match="no checkpoint"):
        main()
