"""What bench starts ends with it, also when it is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.processes import ROOT, WITH_CALLER

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
