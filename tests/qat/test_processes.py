import os
import subprocess
import sys
import time
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


def _touch_slowly(file: Path) -> None:
    time.sleep(0.05)
    file.touch()


def _process(_: int) -> int:
    return os.getpid()
