"""Work in several processes, with results in order; progress bars."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import islice
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from qat.memory import keep_freed_memory

Map = Callable[..., Iterator[Any]]

GROUP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What a terminal or Slurm sends to a whole group of processes at once; the one that leads the others answers."""

_IN_FLIGHT = 128
"""Tasks that are submitted ahead of the results' use: bounds memory at some 30 MB of spectrograms."""


@contextmanager
def process_map(workers: int | None, initializer: Callable[..., object], *arguments: Any) -> Iterator[Map]:
    """A `map` over processes, with results in order, that stops the processes when the block ends, or this process.

    The processes are loky's: they do not import the caller's script, so that it needs no `if __name__ == "__main__"`
    and may come from standard input or a notebook.

    Args:
        workers: number of processes; 0 works in this process (and runs no initializer), None takes the available cores.
        initializer: function that each process runs first.
        arguments: arguments of the initializer.

    Raises:
        ChildProcessError: one of the processes died.
    """
    from joblib import cpu_count  # here, so that `qat --help` is quick
    from joblib.externals.loky import BrokenProcessPool, ProcessPoolExecutor

    workers = cpu_count() if workers is None else workers
    if workers < 0:
        raise ValueError(f"workers={workers} must not be negative")
    if workers == 0:
        yield map
        return
    pending: deque[Future[Any]] = deque()
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(os.getpid(), initializer, *arguments)) as pool:

        def run(function: Callable[..., Any], *columns: Sequence[Any]) -> Iterator[Any]:
            tasks = zip(*columns, strict=True)
            pending.extend(pool.submit(function, *task) for task in islice(tasks, _IN_FLIGHT))
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(function, *task) for task in islice(tasks, 1))

        try:
            yield run
        except BrokenProcessPool as error:
            codes = ", ".join(re.findall(r"\{.*\}", str(error)))  # such as {SIGKILL(-9)}
            raise ChildProcessError(f"a worker process died, perhaps because memory is short {codes}".strip()) from None
        finally:
            # After an error: leaving the pool waits for running tasks, so that none writes files any more.
            for future in pending:
                future.cancel()


def _start(parent: int, initializer: Callable[..., object], *arguments: Any) -> None:
    for number in GROUP_SIGNALS:  # the caller ends the pool
        signal.signal(number, signal.SIG_IGN)
    end_with(parent)
    keep_freed_memory()
    initializer(*arguments)


def end_with(parent: int) -> None:
    """End this process within a second after the one that started it, however that ends.

    A thread asks who the parent is: Linux's own signal (``PR_SET_PDEATHSIG``) comes when the thread that started this
    process ends, and a pool's processes are also started by threads of the pool.

    Args:
        parent: process that has started this one; it may be gone already.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def bar(shown: bool, *columns: ProgressColumn) -> Progress:
    """A progress bar with counts, the remaining time and further columns, on stderr, as stdout is for results."""
    standard = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*standard, *columns, console=Console(stderr=True), disable=not shown)
