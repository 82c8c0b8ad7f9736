"""`demo` in the place of a checkpoint folder: the packaged model, everywhere and wherever the command runs."""

from pathlib import Path

import pytest
from oracle import random_ids
from tiny import tiny_checkpoint
from typer.testing import CliRunner

from hetero_glm5 import LLM, launch_server, model_config
from hetero_glm5.cli import app
from hetero_glm5.core import UserError
from hetero_glm5.model_config import checkpoint_folder
from hetero_glm5.server import serve


@pytest.fixture
def packaged(checkpoints, tmp_path, monkeypatch):
    """A tiny model in the demo model's place, and a folder ./demo that must not be taken for it."""
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16")
    monkeypatch.setattr(model_config, "DEMO_FOLDER", folder)
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def absent(tmp_path, monkeypatch):
    monkeypatch.setattr(model_config, "DEMO_FOLDER", tmp_path / "nothing")


@pytest.fixture
def served(monkeypatch):
    """What launch_server would serve."""
    configs = []
    monkeypatch.setattr(serve, "serve", lambda engine, server, listening: configs.append((engine, server)) or 0)
    return configs


def test_the_name_means_the_packaged_folder_and_nothing_else(packaged):
    assert checkpoint_folder("demo") == str(packaged)
    for other in ("./demo", "demo/", "Demo", "", "/a/demo"):
        assert checkpoint_folder(other) == other


def test_llm_needs_no_path(packaged):
    ids, flags = random_ids(8), {"device": "cpu", "skip_tokenizer": True}
    logits = []
    for path in ((), ("demo",), (packaged,)):
        with LLM(*path, **flags) as llm:
            assert llm.engine.config.model == str(packaged)
            logits.append(llm.logits(ids))
    assert (logits[0] == logits[1]).all() and (logits[0] == logits[2]).all()


def test_the_server_calls_it_demo(packaged, served):
    assert launch_server.main(["--model", "demo", "--port", "0"]) == 0
    assert launch_server.main(["--model", "demo", "--port", "0", "--served-model-name", "mine"]) == 0
    assert launch_server.main(["--model", str(packaged), "--port", "0"]) == 0
    assert [engine.model for engine, _ in served] == [str(packaged)] * 3
    assert [server.served_model_name for _, server in served] == ["demo", "mine", None]


def test_it_can_be_packed(packaged, tmp_path):
    result = CliRunner().invoke(app, ["quantize", "demo", str(tmp_path / "store"), "--kt-method", "BF16"])
    assert result.exit_code == 0 and (tmp_path / "store" / "layer-00002.safetensors").exists()


def test_a_folder_called_demo_can_be_named(packaged):
    for command in (["quantize", "./demo", "o", "--kt-method", "BF16"], ["bench", "quality", "--model", "./demo"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1 and "demo is not a checkpoint" in result.output
    for path in ("./demo", Path("demo")):
        with pytest.raises(UserError, match="demo is not a checkpoint"):
            LLM(path)


def test_an_installation_without_it_says_so(absent, tmp_path, capsys):
    sentence = "the demo model is not in this installation: .*nothing has no config.json. Install the package again"
    with pytest.raises(UserError, match=sentence):
        LLM()
    assert launch_server.main(["--model", "demo"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the demo model is not in this installation") and error.count("\n") == 1
    for command in (["bench", "quality"], ["trace", "record", "out"], ["quantize", "demo", "o", "--kt-method", "BF16"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1 and "error: the demo model is not in this installation" in result.output
