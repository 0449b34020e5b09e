"""Starts and ends programs and processes."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from qat.memory import keep_freed_memory
from qat.processes import end_with

ROOT = Path(__file__).parents[1]
PYTHON = [sys.executable, "-m"]
# The repository's pytest configuration names plugins that a GPU machine may lack.
PYTEST = [*PYTHON, "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]

# Linux kills what is started through this when the thread that started it ends: here, one that waits for it.
WITH_CALLER = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


@contextlib.contextmanager
def running(
    command: Sequence[str], variables: Mapping[str, str] | None = None, **options: Any
) -> Iterator["subprocess.Popen[str]"]:
    """A program with text streams; it is killed with all its children when the block ends.

    On Linux the program also ends when this process is killed. It gets this program's environment and `variables`;
    options are those of `subprocess.Popen`.
    """
    environment = os.environ | (variables or {})
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    text: dict[str, Any] = {"text": True, "errors": "replace"}
    environment |= {"PYTHONPATH": path}
    guard = WITH_CALLER if shutil.which(command[0]) else []  # a program that is not there is reported by its own name
    process = subprocess.Popen([*guard, *command], env=environment, start_new_session=True, **text, **options)
    try:
        yield process
    finally:
        end(process)


def end(process: "subprocess.Popen[Any]") -> None:
    """Kill a program and its process group."""
    _kill_group(process.pid)
    process.wait()


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM ends the block by SystemExit, so that programs started within are ended too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Worker(NamedTuple):
    """A function that runs in a new process, and the pipe to it."""

    process: Any
    pipe: Connection

    @classmethod
    @contextlib.contextmanager
    def start(cls, function: Callable[..., None], *arguments: Any) -> Iterator["Worker"]:
        """Call ``function(pipe, *arguments)`` in a new process, which is killed with its group when the block ends.

        The process is spawned, since CUDA does not survive a fork.
        """
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_lead_group, args=(os.getpid(), function, there, *arguments), daemon=True)
        process.start()
        there.close()
        worker = cls(process, here)
        try:
            yield worker
        finally:
            worker.end()

    def receive(self, until: float) -> Any:
        """The next message.

        Raises:
            TimeoutError: no message came before `until` (`time.monotonic`).
            EOFError, OSError: the process has ended.
        """
        if not self.pipe.poll(max(0.0, until - time.monotonic())):
            raise TimeoutError
        return self.pipe.recv()

    def end(self) -> None:
        """Kill the process and its group."""
        if self.process.exitcode is None:
            _kill_group(self.process.pid)
            self.process.kill()  # which may not lead a group yet
            self.process.join()


def _lead_group(parent: int, function: Callable[..., None], *arguments: Any) -> None:
    os.setsid()
    end_with(parent)
    keep_freed_memory()
    function(*arguments)
