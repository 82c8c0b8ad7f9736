"""What the threads of this process are doing."""

from __future__ import annotations

import threading
from pathlib import Path


def others_sleep() -> bool:
    """Whether the scheduler lists other threads of this process as sleeping (S), and none as running (R)."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if int(task.name) != threading.get_native_id()]
    states = {(task / "stat").read_text().rpartition(") ")[2][0] for task in tasks}
    return "S" in states and "R" not in states
