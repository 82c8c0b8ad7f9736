"""`hetero-glm5 bench quality` from end to end on a tiny random model, and its JSON; what `bench machine` shows."""

import json
import math
import re

import pytest
from tiny import tiny_checkpoint
from typer.testing import CliRunner

from hetero_glm5 import model_config
from hetero_glm5.cli import app, bench
from hetero_glm5.placement.cost import Curve
from hetero_glm5.placement.profile import Profile
from hetero_glm5.quality import answers, report, texts
from hetero_glm5.quality.routing import SHARES
from hetero_glm5.weights.quantize import ExpertLayout

KINDS = ("sums", "stories")  # documents of the others are long


@pytest.fixture
def small(monkeypatch):
    """So little of everything that a model that never ends a turn is measured in seconds."""
    monkeypatch.setattr(answers, "MAX_TOKENS", 6)
    monkeypatch.setattr(report, "TOKENS_FOR_EACH", 10)
    monkeypatch.setattr(report, "RECALL_TOKENS", (64, 5000))
    monkeypatch.setattr(report, "MOST_DEFERRED", 1)
    monkeypatch.setattr(report, "KINDS", KINDS)
    monkeypatch.setattr(texts, "LOOKED", 1)


def run(*arguments, command="quality", code=0):
    result = CliRunner().invoke(app, ["bench", command, *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


def numbers(value) -> bool:
    """Whether all leaves are finite numbers, texts or null."""
    if isinstance(value, dict | list):
        return all(map(numbers, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int) or math.isfinite(value)


def test_the_report(checkpoints, tmp_path, small):
    folder, file = tiny_checkpoint(checkpoints, dtype="bfloat16"), tmp_path / "quality.json"
    command = ["--model", folder, "--count", 2, "--methods", "int4,FP8", "--quick", "--json", file]
    output = run(*command).stdout
    found = json.loads(file.read_text())
    assert numbers(found) and found["format"] == 1 and found["model"] == str(folder)
    assert found["seconds"] > 0 and found["count"] == 2 and found["threads"] >= 1 and found["left_out"] == []

    assert list(found["perplexity"]) == ["INT4", "FP8", "BF16"]
    for row in found["perplexity"].values():
        assert list(row) == [*KINDS, "all", "ratio"]
        assert row["all"]["tokens"] == sum(row[kind]["tokens"] for kind in KINDS) > 0
        nats = sum(row[k]["tokens"] * math.log(row[k]["perplexity"]) for k in KINDS if row[k]["tokens"])
        assert row["all"]["perplexity"] == pytest.approx(math.exp(nats / row["all"]["tokens"]))
        ratio = row["all"]["perplexity"] / found["perplexity"]["BF16"]["all"]["perplexity"]
        assert row["ratio"] == pytest.approx(ratio) and (ratio == 1) == (row is found["perplexity"]["BF16"])
    (deferral,) = found["deferral"].items()
    assert deferral[0] == "1" and deferral[1]["ratio"] != 1

    sparse = found["sparse"]
    assert list(sparse) == ["index_topk", "length", "own", "all"] and sparse["length"] == 4 * sparse["index_topk"] == 64
    assert sparse["all"]["ratio"] != 1 and 0 <= sparse["own"]["tokens"] < sparse["all"]["tokens"] <= 2 * 64

    assert list(found["answers"]) == ["BF16"]
    answered = found["answers"]["BF16"]
    asked = {name: marks["asked"] for name, marks in answered.items()}
    tools = {name: asked.pop(name) for name in list(asked) if name.startswith("tools")}
    assert asked == {"sums": 2, "project": 2, "chats": 2, "recall 64": 1} and sum(tools.values()) == 2
    assert all((marks["well_formed"] is None) == ("calls" not in name) for name, marks in answered.items())

    places = found["drafting"]["all"]["places"]
    assert list(found["drafting"]) == [*report.ASKED_KINDS, "all"] and len(places) == 3
    assert places[0] == sum(found["drafting"][kind]["places"][0] for kind in report.ASKED_KINDS) > 0
    assert all(1 <= steps <= d + 2 for d, steps in enumerate(found["drafting"]["all"]["tokens_per_step"]))

    routing = found["routing"]
    assert (
        routing["layers"] == [2, 3, 4]
        and routing["experts"] == 16
        and list(routing["shares"]) == [f"{share:g}" for share in SHARES]
    )
    assert all(0 < bits < 4 for bits in routing["entropy"]) and len(routing["entropy"]) == 3
    for words in ("INT4", "1 deferred", *answered, "entropy", "to dense", "MTP drafts"):
        assert words in output, words
    assert re.search(rf"{re.escape(folder.name)}, seed 0, .* \d+ s", output)


def test_the_same_again(checkpoints, tmp_path, small, monkeypatch):
    monkeypatch.setattr(report, "ASKED_KINDS", ("sums",))
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16")
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("--model", folder, "--count", 1, "--methods", "BF16", "--quick", "--json", tmp_path / name, "--seed", seed)
        found.append(json.loads((tmp_path / name).read_text()) | {"seconds": 0})
    assert found[0] == found[1] and found[0]["perplexity"] != found[2]["perplexity"]


def test_what_a_model_has_not_is_left_out(checkpoints, tmp_path, small):
    short = {"max_position_embeddings": 1000, "index_topk": 300, "num_nextn_predict_layers": 0}
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16", **short)
    output = run("--model", folder, "--count", 1, "--methods", "INT4", "--json", tmp_path / "json").stdout
    found = json.loads((tmp_path / "json").read_text())
    assert found["drafting"] is None and found["sparse"] is None and list(found["answers"]) == ["INT4", "BF16"]
    assert "recall 5000" not in found["answers"]["INT4"]
    assert len(found["left_out"]) >= 3 and all(f"left out: {sentence[:40]}" in output for sentence in found["left_out"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "no/such/folder"], "error: no/such/folder is not a checkpoint"),
        (["--methods", "INT5"], "error: --kt-method is 'INT5'; it must be one of"),
        (["--methods", ""], "error: --kt-method is ''; it must be one of"),
        (["--json", "no/such/folder/out.json"], "error: --json no/such/folder/out.json: "),
        (["--model", "demo"], "error: the demo model is not in this installation"),
    ],
)
def test_errors_are_one_sentence(tmp_path, monkeypatch, flags, sentence):
    monkeypatch.setattr(model_config, "DEMO_FOLDER", tmp_path)
    output = run(*flags, code=1).stderr
    assert output.splitlines()[-1].startswith(sentence) and "Traceback" not in output


def test_the_machine(tmp_path, monkeypatch):
    curve = Curve((1.0, 32.0, 512.0), (2e-12, 4e-12, 50e-12))
    asked = []

    def measured(methods, *, threads, seconds, tell):
        asked.append((methods, threads, seconds))
        tell("INT4 on the host")
        return Profile("a processor", "avx512", 16, None, {"torch": "2"}, dict.fromkeys(methods, curve), {}, None, 3e-5)

    monkeypatch.setattr(bench, "calibrate", measured)
    file = tmp_path / "machine.json"
    result = run("--methods", "amxint4,FP8", "--seconds", 5, "--threads", 16, "--out", file, command="machine")
    assert asked == [(("INT4", "FP8"), 16, 5.0)] and list(Profile.load(file).host) == ["INT4", "FP8"]
    assert "INT4 on the host" in result.stderr
    ms = 1e3 * ExpertLayout("INT4", 6144, 2048).blob_bytes * curve.seconds[0]
    assert re.search(rf"INT4 +{ms:.2f} +500\.0 +\d+\n", result.stdout), result.stdout
    for words in ("host: a processor", "no CUDA device here", "avx512, 16 threads, 30 µs"):
        assert words in result.stdout, words


def test_the_machine_errors_are_one_sentence():
    for flags, sentence in (
        (["--methods", "INT5"], "error: --kt-method is 'INT5'"),
        (["--out", "no/such/folder/out.json"], "error: --out no/such/folder/out.json: "),
    ):
        assert run(*flags, command="machine", code=1).stderr.startswith(sentence)
