"""Loading, told to a log: one line for each stage and every few seconds."""

import logging

from rich.console import Console

from hetero_glm5.core import LoadProgress
from hetero_glm5.server import progress


def test_lines_for_a_log(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    display = progress.LoadDisplay(Console(force_terminal=False))
    half = LoadProgress("experts", 2_000_000_000, 6_000_000_000, 4.0)
    for _ in range(3):
        display.update(half)
    display.update(LoadProgress("warming up"))
    assert caplog.messages == ["loading: experts, 2 of 6 GB, 0.50 GB/s, 8 s left", "loading: warming up"]
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    display.update(LoadProgress("warming up"))
    assert len(caplog.messages) == 3


def test_a_bar_for_a_terminal(halfway):
    console = Console(force_terminal=True, record=True, width=100)
    display = progress.LoadDisplay(console)
    display.update(LoadProgress("reading headers"))
    display.update(halfway)
    display.close()
