"""How loading goes, for whoever watches the terminal: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from hetero_glm5.core import LoadProgress

log = logging.getLogger(__name__)

LINE_SECONDS = 5.0


def start_log(console: Console) -> None:
    """Log lines to stderr; on a terminal through rich, so that they do not tear the bar."""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


class LoadDisplay:
    """update() from the thread that loads, close() when it is done. `doing`: the word for it."""

    def __init__(self, console: Console, doing: str = "loading"):
        self._doing, self._stage, self._told = doing, "", 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task("starting", total=None)
            self._bar.start()

    def update(self, progress: LoadProgress) -> None:
        if self._bar is not None:
            total = progress.bytes_total or None
            self._bar.update(self._task, description=progress.stage, total=total, completed=progress.bytes_done)
            return
        now = time.monotonic()
        if progress.stage != self._stage or now - self._told >= LINE_SECONDS:
            self._stage, self._told = progress.stage, now
            log.info(sentence(progress, self._doing))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def sentence(progress: LoadProgress, doing: str = "loading") -> str:
    if not progress.bytes_done:
        return f"{doing}: {progress.stage}"
    amount = f"{progress.bytes_done / 1e9:.3g} of {progress.bytes_total / 1e9:.3g} GB, {progress.gb_per_s:.2f} GB/s"
    left = progress.eta_seconds
    return f"{doing}: {progress.stage}, {amount}" + (f", {left:.0f} s left" if left else "")
