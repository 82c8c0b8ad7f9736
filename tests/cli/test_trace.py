"""`hetero-glm5 trace record`: the file that it writes, and what it refuses."""

from tiny import tiny_checkpoint
from typer.testing import CliRunner

from hetero_glm5.cli import app
from hetero_glm5.placement.trace import Trace
from hetero_glm5.quality.report import ASKED_KINDS


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["trace", "record", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_requests_of_every_kind_are_recorded(checkpoints, tmp_path):
    folder, out = tiny_checkpoint(checkpoints, dtype="bfloat16"), tmp_path / "routing.npz"
    output = run(out, "--model", folder, "--requests", 5, "--max-tokens", 3, "--together", 2)
    trace = Trace.load(out)
    assert trace.kinds.tolist() == [*ASKED_KINDS, ASKED_KINDS[0]] and set(trace.request) == set(range(5))
    assert trace.ids.shape == (len(trace), 3, 4) and 0 < trace.decode.sum() <= 10
    assert f"{len(trace)} tokens, {trace.decode.sum()} of them decoded, of 5 requests" in output
    assert f"error: {out} exists" in run(out, "--model", folder, code=1)
    run(tmp_path / "again", "--model", folder, "--requests", 5, "--max-tokens", 3, "--together", 2)
    assert (tmp_path / "again").read_bytes() == out.read_bytes()


def test_errors_are_one_sentence(tmp_path):
    assert "error: " in run(tmp_path / "no" / "such", code=1)
    assert "no/such is not a checkpoint" in run(tmp_path / "out", "--model", "no/such", code=1)
    assert not list(tmp_path.iterdir())
