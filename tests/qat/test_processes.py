import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import qat
from qat.processes import process_map


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order(workers: int) -> None:
    with process_map(workers, int) as run:
        assert list(run(pow, range(300), [2] * 300)) == [n * n for n in range(300)]
        processes = set(run(_process, range(8)))
    assert (processes == {os.getpid()}) == (workers == 0)


def test_errors_come_through() -> None:
    with pytest.raises(ZeroDivisionError), process_map(1, int) as run:
        list(run(divmod, [1, 1], [1, 0]))


def test_after_an_error_tasks_that_wait_are_dropped_and_those_that_run_are_waited_for(tmp_path: Path) -> None:
    files = [tmp_path / str(n) for n in range(100)]
    with pytest.raises(ZeroDivisionError), process_map(2, int) as run:
        [1 / 0 for _ in run(_touch_slowly, files)]
    written = len(list(tmp_path.iterdir()))
    assert 1 <= written < 50
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) == written


def test_negative_workers() -> None:
    with pytest.raises(ValueError, match="workers=-1 must not be negative"), process_map(-1, int):
        pass


@pytest.mark.parametrize("from_file", [True, False])
def test_a_script_without_a_main_guard_runs_once(tmp_path: Path, from_file: bool) -> None:
    script = "\n".join(
        [
            "from qat.processes import process_map",
            "print('running')",
            "with process_map(1, int) as run:",
            "    print(*run(abs, [-1, -2]))",
        ]
    )
    (tmp_path / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(qat.__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "script.py")] if from_file else [sys.executable]
    done = subprocess.run(
        command, input=None if from_file else script, capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == "running\n1 2\n", done.stderr


WORKING = """
import os, sys, time
from qat.processes import process_map

def work(n):
    os.write(1, b"%d\\n" % os.getpid())  # at once, as two do so
    time.sleep(1000)

with process_map(2, int) as run:
    list(run(work, range(2)))
"""


def working() -> tuple["subprocess.Popen[str]", list[int]]:
    """A process that leads a session, and its two workers in the middle of a task."""
    environment = os.environ | {"PYTHONPATH": str(Path(qat.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKING],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )
    return process, [int(process.stdout.readline()) for _ in range(2)]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_workers_end_with_their_caller_however_it_ends() -> None:
    process, workers = working()
    try:
        assert all(map(is_alive, workers))
        process.kill()
        process.wait()
        assert wait_until(lambda: not any(map(is_alive, workers)), 5)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if any(map(is_alive, workers)) else None


def test_only_the_caller_answers_a_signal_to_the_whole_group() -> None:
    """As Slurm's SIGTERM, or the SIGHUP of a closed terminal."""
    process, workers = working()
    try:
        for worker in workers:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(worker, number)
        time.sleep(0.3)
        assert all(map(is_alive, workers))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_worker_that_is_killed_is_told() -> None:
    died = pytest.raises(ChildProcessError, match=r"^a worker process died, perhaps because memory is .*SIGKILL.*$")
    with died as raised, process_map(1, int) as run:
        list(run(_end, [signal.SIGKILL]))
    assert "\n" not in str(raised.value)


def _end(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def _touch_slowly(file: Path) -> None:
    time.sleep(0.05)
    file.touch()


def _process(_: int) -> int:
    return os.getpid()
