import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from hetero_glm5.cli import app
from hetero_glm5.placement.trace import Trace

SMALL = ["simulate", "synthetic:layers=2,steps=120,topic_tokens=32", "--shares", "10,50"]


def test_the_table_and_the_json(tmp_path):
    result = CliRunner().invoke(app, [*SMALL, "--policies", "uniform,adaptive", "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 0, result.output
    assert "step ms" in result.output and result.output.count("adaptive") == 2
    found = json.loads((tmp_path / "a.json").read_bytes())
    rates = {(row["share"], row["policy"]): row["hit_rate"] for row in found["rows"]}
    assert rates[0.1, "uniform"] < rates[0.1, "adaptive"] < rates[0.5, "adaptive"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policies", "best"], "--policies names 'best'; there are uniform"),
        (["--shares", "4,x"], "--shares is '4,x'"),
        (["--shares", "400"], "--shares holds 400; it must lie between 0 and 100"),
        (["--machine", "nowhere.json"], "nowhere.json is no machine profile"),
        (["nowhere"], "nowhere is no routing trace"),
        (["synthetic:speed=1"], "'speed=1' is none of steps=…, layers=…"),
        (["synthetic:users=x"], "'users=x' is none of"),
        (["synthetic:recency=2"], "recency lies between 0 and 1"),
        (["synthetic:layers=0"], "all else from 1"),
        (["--plot", "nowhere/a.png"], "is no folder"),
        (["prefill.trace", "--policies", "uniform"], "prefill.trace: the trace has no decode step without prefill"),
    ],
)
def test_refusals(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = np.zeros(1, dtype=np.int32)
    Trace(np.zeros((1, 1, 2)), one, one, one, one > 0, one, np.array([""]), 4).save(tmp_path / "prefill.trace")
    result = CliRunner().invoke(app, ["simulate", *options])
    assert result.exit_code == 1 and words in " ".join(result.output.split())


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    result = CliRunner().invoke(app, [*SMALL, "--policies", "uniform,adaptive", "--plot", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(app, [*SMALL, "--plot", str(tmp_path / "a.png")])
    assert result.exit_code == 1 and "--plot needs matplotlib" in result.output
