"""Work spread over processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Map = Callable[..., Iterator[Any]]

_IN_FLIGHT = 128
"""Results that may wait to be used: bounds memory at some 30 MB of spectrograms."""


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def ordered_map(
    workers: int | None,
    module: str,
    initializer: Callable[..., object],
    arguments: tuple[Any, ...] = (),
    *,
    long: bool = False,
) -> Iterator[Map]:
    """A `map` over processes that gives results in order and stops the processes when the block ends.

    Args:
        workers: processes; 0 works in this process (and runs no initializer), None takes the available cores.
        module: imported once before the processes fork from their server.
        initializer: run in each process first.
        arguments: of the initializer.
        long: tasks take minutes: they are handed out singly, each to a new process, whose peak memory is its own.
    """
    workers = cores() if workers is None else workers
    if workers < 0:
        raise ValueError(f"workers={workers} must not be negative")
    if workers == 0:
        yield map
        return
    # A fork server rather than forks of this process: torch's thread pool does not survive a fork. It imports torch
    # once, which spawned workers would each do again.
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload([module])
    fresh = {"max_tasks_per_child": 1} if long else {}
    with _hidden_main(), ProcessPoolExecutor(workers, context, initializer, arguments, **fresh) as pool:

        def run(function: Callable[..., Any], *columns: Sequence[Any]) -> Iterator[Any]:
            for start in range(0, len(columns[0]), _IN_FLIGHT):
                block = (column[start : start + _IN_FLIGHT] for column in columns)
                yield from pool.map(function, *block, chunksize=1 if long else 4)

        try:
            yield run
        except BaseException:
            pool.shutdown(cancel_futures=True)  # waits for what is running, so that nobody writes on
            raise


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep worker processes from running the caller's script again.

    They would import it in search of functions, which fails for a script from standard input or a notebook cell and
    recurses for one without `if __name__ == "__main__"`. Here every function comes from a module.
    """
    main: dict[str, Any] = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


def bar(shown: bool) -> Progress:
    """A progress bar with counts and the time left, on the error stream: the output stream is for results."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
