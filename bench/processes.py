"""Programs that bench starts, and their ends."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def start(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, group: bool = True, **options: Any
) -> "subprocess.Popen[str]":
    """A program with text streams.

    Args:
        command: the program and its arguments.
        environment: its variables; this program's by default.
        group: lead a group of its own, which `end` kills; else it ends with this program's group.
        options: of `subprocess.Popen`.
    """
    variables = os.environ if environment is None else environment
    path = os.pathsep.join(filter(None, (str(ROOT), variables.get("PYTHONPATH"))))
    return subprocess.Popen(
        command, env={**variables, "PYTHONPATH": path}, text=True, errors="replace", start_new_session=group, **options
    )


def end(process: "subprocess.Popen[Any]") -> None:
    """Kills the program, if it still runs, and its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
