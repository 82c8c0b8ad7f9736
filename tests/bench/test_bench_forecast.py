import bench_forecast
import pytest
from tiny import tiny_checkpoint

from hetero_glm5.cli import rehearsal


@pytest.mark.parametrize(("forecast", "code"), [(0.9, 0), (1.3, 1), (0.7, 1)])
def test_the_exit_code_says_whether_it_is_right(monkeypatch, capsys, forecast, code):
    monkeypatch.setattr("sys.argv", ["bench", "--model", "demo", "--rounds", "2"])
    monkeypatch.setattr(bench_forecast, "predicted", lambda config: forecast)
    monkeypatch.setattr(bench_forecast, "measured", lambda config, steps: 1.0)
    assert bench_forecast.main() == code
    assert f"{100 * (forecast - 1):+.1f}%" in capsys.readouterr().out


def test_both_sides_run(monkeypatch, checkpoints, capsys):
    folder = tiny_checkpoint(checkpoints, dtype="bfloat16")
    flags = "--rounds 1 --steps 2 --device cpu --chunked-prefill-size 128"
    monkeypatch.setattr("sys.argv", ["bench", "--model", str(folder), *flags.split()])
    monkeypatch.setattr(rehearsal, "STEPS", 4)
    monkeypatch.setattr(bench_forecast, "MOST_OFF", 1e9)
    assert bench_forecast.main() == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("predicted ")
