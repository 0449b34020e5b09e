"""`python -m bench tests`, on files that need no GPU."""

import csv
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_tests
from bench.processes import terminating

FILES = {
    "test_fine": "def test(): pass",
    "test_other": "import pytest\n@pytest.mark.skip('as 3 passed before')\ndef test(): pass\ndef test_too(): pass",
    "test_skipped": "import pytest\n@pytest.mark.skip('where 2 passed already')\ndef test(): pass",
    "test_wrong": "def test(): assert not '1 passed'",
    "test_broken": "import nowhere",
}
HANGS = "import os, time\ndef test():\n    open({!r}, 'w').write(str(os.getpid()))\n    time.sleep(600)"


def test_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"{name}.py" for name in FILES]
    for file, text in zip(files, FILES.values(), strict=True):
        file.write_text(text)
    assert gpu_tests.run(files, 120, tmp_path) == {
        "test_fine": "passed",
        "test_other": "passed",
        "test_skipped": "skipped",
        "test_wrong": "FAILED",
        "test_broken": "FAILED",
    }
    assert "where 2 passed already" in (tmp_path / "tests.log").read_text()
    assert "test_wrong.py: FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("told", [False, True])
def test_what_hangs_ends_with_the_time_and_with_this_program(told: bool, tmp_path: Path) -> None:
    """Which a session asks to end by SIGTERM."""
    file, note = tmp_path / "test_hangs.py", tmp_path / "pid"
    file.write_text(HANGS.format(str(note)))
    if told:
        ending = threading.Thread(target=terminate, args=(note,))
        ending.start()
        with pytest.raises(SystemExit), terminating():
            gpu_tests.run([file], 60, tmp_path)
        ending.join()
    else:
        assert gpu_tests.run([file], 5, tmp_path) == {"test_hangs": "out of time"}
    assert not note.exists() or not Path(f"/proc/{note.read_text()}").exists()


def terminate(note: Any) -> None:
    """Once the test runs."""
    while not note.exists() or not note.read_text():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_exit_code_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for verdicts, code in (({"a": "passed", "b": "skipped"}, 0), ({"a": "passed", "b": "out of time"}, 1)):
        monkeypatch.setattr(gpu_tests, "run", lambda files, seconds, out, verdicts=verdicts: verdicts)
        assert gpu_tests.main(tmp_path, 1) == code
        with (tmp_path / "tests.csv").open() as file:
            assert list(csv.reader(file)) == [["file", "verdict"], *map(list, verdicts.items())]
