from __future__ import annotations

import json

from harness import Row, Timing, measure, print_json, print_table, read_roof


def test_row_arithmetic():
    row = Row("x", Timing((0.5, 0.25, 0.25)), nbytes=1e9, roof=8e9)
    assert row.timing.median == 0.25
    assert 0.49 < row.timing.p99 <= 0.5
    assert row.rate == 4e9
    assert row.of_roof == 0.5
    assert Row("y", Timing((0.5,))).of_roof is None


def test_measure_counts_calls():
    calls, syncs = [], []
    timing = measure(lambda: calls.append(1), repeats=3, warmup=2, sync=lambda: syncs.append(1))
    assert (len(calls), len(syncs), len(timing.seconds)) == (5, 6, 3)


def test_roof_is_a_bandwidth():
    assert read_roof("cpu", nbytes=1 << 24, repeats=2) > 1e8


def test_output(capsys):
    rows = [Row("a", Timing((0.001,)), 1e6, 2e9), Row("b", Timing((0.003,)))]
    print_table(rows, whole=0.004)
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["a", "1.000", "1.000", "25.0%", "1.00", "1.0", "50.0%"]
    assert table[2].split() == ["b", "3.000", "3.000", "75.0%"]
    print_json(rows, batch=2)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {
        "batch": 2, "name": "a", "median_ms": 1.0, "p99_ms": 1.0, "bytes": 1e6, "gb_per_s": 1.0, "of_roof": 0.5
    }  # fmt: skip
    assert second["of_roof"] is None
