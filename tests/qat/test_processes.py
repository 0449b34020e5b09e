import os
import subprocess
import sys
from pathlib import Path

import pytest

import qat
from qat.processes import ordered_map


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order(workers):
    with ordered_map(workers, "math", int) as run:
        assert list(run(pow, range(300), [2] * 300)) == [n * n for n in range(300)]
        processes = set(run(_process, range(8)))
    assert (processes == {os.getpid()}) == (workers == 0)


def test_errors_come_through():
    with pytest.raises(ZeroDivisionError), ordered_map(1, "math", int) as run:
        list(run(divmod, [1, 1], [1, 0]))


def test_negative_workers():
    with pytest.raises(ValueError, match="workers=-1 must not be negative"), ordered_map(-1, "math", int):
        pass


@pytest.mark.parametrize("from_file", [True, False])
def test_a_script_without_a_main_guard_runs_once(tmp_path, from_file):
    script = "\n".join(
        [
            "from qat.processes import ordered_map",
            "print('running')",
            "with ordered_map(1, 'math', int) as run:",
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


def _process(_: int) -> int:
    return os.getpid()
