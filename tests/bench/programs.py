"""Programs that tests look at from outside."""

import contextlib
import time
from pathlib import Path


def running(pids: str) -> bool:
    """Whether one of the processes runs; one that has ended and that nobody has waited for does not."""
    for pid in pids.split():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return True
    return False


def gone(pids: str) -> bool:
    """Whether none of them runs any more, soon: what is killed takes a moment to end."""
    until = time.monotonic() + 10
    while running(pids) and time.monotonic() < until:
        time.sleep(0.02)
    return not running(pids)
