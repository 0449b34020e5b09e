"""Work in several processes, with results in order; progress bars."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import islice
from typing import Any

from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

Map = Callable[..., Iterator[Any]]

_IN_FLIGHT = 128
"""Tasks that are submitted ahead of the results' use: bounds memory at some 30 MB of spectrograms."""


@contextmanager
def process_map(workers: int | None, initializer: Callable[..., object], *arguments: Any) -> Iterator[Map]:
    """A `map` over processes, with results in order, that stops the processes when the block ends.

    The processes are loky's: they do not import the caller's script, so that it needs no `if __name__ == "__main__"`
    and may come from standard input or a notebook.

    Args:
        workers: number of processes; 0 works in this process (and runs no initializer), None takes the available cores.
        initializer: function that each process runs first.
        arguments: arguments of the initializer.
    """
    workers = cpu_count() if workers is None else workers
    if workers < 0:
        raise ValueError(f"workers={workers} must not be negative")
    if workers == 0:
        yield map
        return
    pending: deque[Future[Any]] = deque()
    # Idle processes end after a minute, also those that a killed caller has left behind.
    with ProcessPoolExecutor(workers, timeout=60, initializer=_start, initargs=(initializer, *arguments)) as pool:

        def run(function: Callable[..., Any], *columns: Sequence[Any]) -> Iterator[Any]:
            tasks = zip(*columns, strict=True)
            pending.extend(pool.submit(function, *task) for task in islice(tasks, _IN_FLIGHT))
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(function, *task) for task in islice(tasks, 1))

        try:
            yield run
        finally:
            # After an error: leaving the pool waits for running tasks, so that none writes files any more.
            for future in pending:
                future.cancel()


def _start(initializer: Callable[..., object], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the caller ends the pool
    initializer(*arguments)


def bar(shown: bool, *columns: ProgressColumn) -> Progress:
    """A progress bar with counts, the remaining time and further columns, on stderr, as stdout is for results."""
    standard = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*standard, *columns, console=Console(stderr=True), disable=not shown)
