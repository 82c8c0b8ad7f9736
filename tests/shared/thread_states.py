"""What the threads of this process are doing."""

from __future__ import annotations

import threading
import time
from pathlib import Path


def others_sleep(within: float = 2.0) -> bool:
    """Whether the scheduler comes to list other threads of this process as sleeping (S), and none as running (R)."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        found = states()
        if "S" in found and "R" not in found:
            return True
        time.sleep(0.01)
    return False


def states() -> str:
    """The scheduler's letter for each other thread of this process: R = runs, S = sleeps."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != threading.get_native_id()]
    return "".join((task / "stat").read_text().rpartition(") ")[2][0] for task in tasks)
