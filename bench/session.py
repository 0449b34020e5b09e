"""All measurements and tests on a GPU within some minutes, the most valuable first: `python -m bench session`.

Each part is a program with a share of the time. A part that fails, or hangs and is killed, does not stop the others;
its unused time goes to the later parts. Kernels are checked first: a suite that needs a wrong kernel is not measured.
"""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from bench.processes import PYTEST, PYTHON, ROOT, running

GRACE = 30.0  # seconds to finish the current case after a part's share; the whole session has none
QUIT = 5.0  # seconds between SIGTERM and SIGKILL
# The operators of each suite, of which at least one must be right.
NEEDS = {
    "step": ("conv",),
    "atl": ("gram", "folded"),
    "conv": ("conv",),
    "inference": ("conv",),
    "epoch": ("conv",),
    "linear": ("linear",),
}
OPERATORS = ("conv", "linear", "gram", "folded")  # the name of each checked kernel contains one of them


class Part(NamedTuple):
    """One program.

    Args:
        name: name in the log.
        share: seconds in a session of 525 seconds; other sessions are divided in proportion.
        command: program and arguments; "{budget}" is replaced by seconds, "{suites}" by the suites to measure, and
            "{resume}" by "--resume" once this session has written a results.csv.
        suites: suites that it measures; if none can be measured, the part is skipped.
        file: name of another file for its output, besides the log.
    """

    name: str
    share: float
    command: Sequence[str]
    suites: Sequence[str] = ()
    file: str | None = None


def parts(out: Path, commit: str) -> list[Part]:
    """The parts of a session on a GPU, by value."""
    name = ["--out", str(out), "--commit", commit, "--budget", "{budget}"]
    measure = [*PYTHON, "bench", "run", "{suites}", *name, "{resume}"]
    check = [*PYTHON, "qkernels.runtime", "--check", "--json", str(out / "check.json")]
    tests = [*PYTHON, "bench", "tests", "--out", str(out), "--seconds", "{budget}"]
    headline = [*PYTEST, str(ROOT / "bench"), "-q", "-k", "step or atl", f"--benchmark-json={out / 'benchmark.json'}"]
    return [
        Part("environment", 10, [*PYTHON, "qkernels.runtime"], file="environment.txt"),
        Part("check", 40, check, file="check.txt"),
        Part("step", 100, measure, ["step"]),
        Part("atl", 45, measure, ["atl"]),
        Part("conv", 90, measure, ["conv"]),  # batch 20 before 256, by rank
        Part("tests", 110, tests),
        Part("rest", 40, measure, list(NEEDS)),
        Part("fresh", 40, [*PYTHON, "bench", "fresh", *name], ["step"]),
        Part("share", 30, [*PYTHON, "bench", "share", *name], ["step"]),
        Part("benchmark", 20, headline, ["step"]),
    ]


def run(parts: Sequence[Part], seconds: float, out: Path) -> dict[str, str]:
    """The verdict on each part: "ok", "exit code N", "out of time", "not begun" (no time left) or "left out".

    Writes log.txt with all output and the verdicts.
    """
    deadline, wall = time.monotonic() + seconds, time.time()
    out.mkdir(parents=True, exist_ok=True)
    verdicts: dict[str, str] = {}

    def written(name: str) -> bool:
        """Whether this session wrote the file; an earlier one may have had other kernels or another device."""
        path = out / name
        return path.is_file() and path.stat().st_mtime >= wall

    with (out / "log.txt").open("w") as log:

        def say(text: str) -> None:
            print(text, end="", flush=True)
            log.write(text)
            log.flush()

        for number, part in enumerate(parts):
            left = deadline - time.monotonic()
            share = left * part.share / sum(other.share for other in parts[number:])
            suites = list(part.suites)
            if suites and written("check.json"):
                suites = _right(suites, _verdicts(out / "check.json"), say)
            if left < 1 or (part.suites and not suites):
                verdicts[part.name] = "not begun" if left < 1 else "left out"
                continue
            resume = ["--resume"] if written("results.csv") else []
            words = {"{budget}": [f"{share:.0f}"], "{suites}": suites, "{resume}": resume}
            command = [new for word in part.command for new in words.get(word, [word])]
            say(f"== {part.name}, {share:.0f} s: {' '.join(command)}\n")
            start = time.monotonic()
            with (out / part.file).open("w") if part.file else contextlib.nullcontext() as file:
                verdicts[part.name] = _run(command, min(left, share + GRACE), say, file)
            say(f"== {part.name}: {verdicts[part.name]} after {time.monotonic() - start:.0f} s\n")
        say("".join(f"{name:12} {verdict}\n" for name, verdict in verdicts.items()))
    for draft in out.glob(".*.part"):  # left by a program that was killed while writing
        draft.unlink()
    return verdicts


def _verdicts(check: Path) -> dict[str, str]:
    """Verdict by kernel, "right" or the problem; empty if the check wrote nothing readable."""
    try:
        kernels = json.loads(check.read_text())["kernels"]
        return {str(kernel): str(verdict) for kernel, verdict in kernels.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}


def _right(suites: Sequence[str], kernels: Mapping[str, str], say: Callable[[str], None]) -> list[str]:
    """The suites that may be measured; prints why the others may not.

    A kernel that is not right spoils the operators in its name, or all operators if its name contains none.
    """
    spoilt: dict[str, str] = {}
    for kernel, verdict in kernels.items():
        if verdict != "right":
            named = [operator for operator in OPERATORS if operator in kernel.lower()]
            spoilt |= dict.fromkeys(named or OPERATORS, f"{kernel}: {verdict}")
    wrong = {suite: [spoilt[each] for each in NEEDS[suite]] for suite in suites if spoilt.keys() >= set(NEEDS[suite])}
    for suite, reasons in wrong.items():
        say(f"== the suite {suite} is not measured: {'; '.join(reasons)}\n")
    return [suite for suite in suites if suite not in wrong]


def _run(command: Sequence[str], seconds: float, say: Callable[[str], None], file: IO[str] | None) -> str:
    """The verdict on a program."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with running(command, {"PYTHONUNBUFFERED": "1"}, **pipes) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=_copy, args=(process.stdout, say, file), daemon=True)
        reader.start()
        try:
            code = process.wait(seconds)
            verdict = f"exit code {code}" if code else "ok"
        except subprocess.TimeoutExpired:
            verdict = "out of time"
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(QUIT)
    reader.join(QUIT)
    return verdict


def _copy(lines: Iterable[str], say: Callable[[str], None], file: IO[str] | None) -> None:
    with contextlib.suppress(ValueError):  # the files are closed after the part
        for line in lines:
            say(line if line.endswith("\n") else f"{line}\n")
            if file:
                file.write(line)
                file.flush()
