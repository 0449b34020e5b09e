"""The tests of tests/gpu, all files at the same time, each in its own process: `python -m bench tests`.

They spend most of their time on the host, compiling, so together they take as long as the longest. Writes tests.log,
and tests.csv with the verdict on each file.
"""

import contextlib
import csv
import re
import subprocess
import tempfile
import time
from pathlib import Path

from bench.processes import PYTEST, ROOT, end, running

OPTIONS = ["-v", "-ra", "--tb=short", "--durations=5"]


def run(files: list[Path], seconds: float, out: Path) -> dict[str, str]:
    """The verdict on each file: "passed", "skipped" (all its tests), "FAILED" or "out of time"."""
    deadline = time.monotonic() + seconds
    verdicts: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        started = []
        for file in files:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [*PYTEST, *OPTIONS, str(file)]
            program = running(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            started.append((file, stack.enter_context(program), log))
        whole = stack.enter_context((out / "tests.log").open("w"))
        for file, process, log in started:
            try:
                verdict = "FAILED" if process.wait(max(0.0, deadline - time.monotonic())) else ""
            except subprocess.TimeoutExpired:
                end(process)
                verdict = "out of time"
            log.seek(0)
            text = log.read()
            # Only pytest's summary, the last line, counts: the reason of a skipped test may have any text.
            passed = re.search(r"\b\d+ passed\b", text.rstrip().rpartition("\n")[2])
            verdicts[file.stem] = verdict or ("passed" if passed else "skipped")
            whole.write(f"{file.name}: {verdicts[file.stem]}\n{text}\n")
            print(f"{file.name}: {verdicts[file.stem]}", *text.splitlines()[-12:], sep="\n", flush=True)
    return verdicts


def main(out: Path, seconds: float) -> int:
    """Print the end of every log; return 1 if a test failed or the time was up."""
    out.mkdir(parents=True, exist_ok=True)
    verdicts = run(sorted((ROOT / "tests" / "gpu").glob("test_*.py")), seconds, out)
    with (out / "tests.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("file", "verdict"), *verdicts.items()])
    return int(any(verdict not in ("passed", "skipped") for verdict in verdicts.values()))
