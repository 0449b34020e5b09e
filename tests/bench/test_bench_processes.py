"""What bench starts ends with it, also when it is killed; one process writes to a folder of results."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.processes import ROOT, WITH_CALLER
from qat.files import held, lock_of

WORKER = """
import os, time
from bench.processes import Worker

def work(pipe):
    pipe.send(os.getpid())
    time.sleep(1000)

if __name__ == "__main__":
    with Worker.start(work) as worker:
        print(worker.receive(time.monotonic() + 60), flush=True)
        time.sleep(1000)
"""

PROGRAM = """
import sys, time
from bench.processes import running

with running([sys.executable, "-c", "import time; time.sleep(1000)"]) as process:
    print(process.pid, flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("text", [WORKER, PROGRAM], ids=["worker", "program"])
@pytest.mark.skipif(not WITH_CALLER, reason="needs setpriv, of Linux")
def test_what_is_started_ends_with_its_caller(text: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "script.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as caller:
        started = Path("/proc") / caller.stdout.readline().strip()
        time.sleep(0.2)  # until setpriv has become the program
        assert started.is_dir()
        caller.kill()
    end = time.monotonic() + 5
    while started.is_dir() and (started / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        if time.monotonic() > end:
            os.kill(int(started.name), signal.SIGKILL)
            pytest.fail("it lives on")
        time.sleep(0.05)


def test_a_second_measurement_of_the_same_into_a_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(lock_of(tmp_path / "run")):
        assert main(["run", "--smoke", "--out", str(tmp_path)]) == 2
    told = rf"bench run: {tmp_path}: process {os.getpid()} on .* writes there; choose another folder, or wait\n"
    assert re.fullmatch(told, capsys.readouterr().err)
    assert not (tmp_path / "results.csv").exists()
