"""`hetero-glm5 trace`: the file that `record` writes, what `info` says of one, and what both refuse."""

import numpy as np
from tiny import tiny_checkpoint
from typer.testing import CliRunner

from hetero_glm5.cli import app
from hetero_glm5.placement.trace import Trace
from hetero_glm5.quality.report import ASKED_KINDS


def run(*arguments, code=0, command="record"):
    result = CliRunner().invoke(app, ["trace", command, *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_requests_of_every_kind_are_recorded(checkpoints, tmp_path):
    folder, out = tiny_checkpoint(checkpoints, dtype="bfloat16"), tmp_path / "routing.trace"
    output = run(out, "--model", folder, "--requests", 5, "--max-tokens", 3, "--together", 2)
    trace = Trace.load(out)
    assert trace.kinds.tolist() == [*ASKED_KINDS, ASKED_KINDS[0]] and set(trace.request) == set(range(5))
    assert trace.ids.shape == (len(trace), 3, 4) and 0 < trace.decode.sum() <= 10
    assert f"{len(trace)} tokens, {trace.decode.sum()} of them decoded, of 5 requests" in output
    assert f"error: {out} exists" in run(out, "--model", folder, code=1)
    run(tmp_path / "again", "--model", folder, "--requests", 5, "--max-tokens", 3, "--together", 2)
    assert (tmp_path / "again").read_bytes() == out.read_bytes()
    summary, *table = run(out, command="info").splitlines()
    assert summary in output and f" {trace.decode.sum()} " in next(line for line in table if line.startswith("decode"))


def test_errors_are_one_sentence(tmp_path):
    assert "error: " in run(tmp_path / "no" / "such", code=1)
    assert "no/such is not a checkpoint" in run(tmp_path / "out", "--model", "no/such", code=1)
    assert not list(tmp_path.iterdir())


def a_trace(path, decoded):
    """20 experts; in both layers expert e is chosen e times in decode, and always expert 7 in prefill."""
    chosen = np.concatenate([np.repeat(np.arange(20), np.arange(20)) * decoded, np.full(100, 7)])
    decode = np.arange(290) < 190 * decoded
    zeros = np.zeros(290, dtype=np.int64)
    ids = np.stack([chosen, chosen], 1)[:, :, None]
    Trace(ids, zeros, zeros, np.arange(290), decode, np.array([3, 4]), np.array(["a"]), 20).save(path)
    return path


def test_info_keeps_the_phases_apart(tmp_path):
    output = run(a_trace(tmp_path / "t", True), command="info")
    assert "290 tokens, 190 of them decoded, of 1 requests in 1 steps; 1 of 20 experts, 2 layers." in output
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    tops = [19, 19 + 18, sum(range(16, 20)), sum(range(10, 20))]
    p = np.arange(1, 20) / 190
    decode = ["190", f"{-(p * np.log2(p)).sum():.3f}", *(f"{100 * n / 190:.1f}" for n in tops)]
    assert [word for word in lines["decode"][1:] if word != "%"] == decode
    assert [word for word in lines["prefill"][1:] if word != "%"] == ["100", "0.000"] + ["100.0"] * 4
    assert max(map(len, output.splitlines()[1:])) <= 80 and "of 4.322 bits" in output


def test_info_on_a_phase_without_tokens_and_on_other_files(tmp_path):
    output = run(a_trace(tmp_path / "t", False), command="info")
    assert ["decode", "0"] in [line.split() for line in output.splitlines()]
    (tmp_path / "text").write_text("no trace")
    assert "text is no routing trace" in run(tmp_path / "text", command="info", code=1)
