"""All that a GPU is to be asked in some minutes, the most valuable first: `python -m bench session`.

Each part is a program of its own with a share of the time. One that fails, or that hangs and is ended, stops no other;
what it leaves unused falls to those behind it. First the kernels are checked: nothing is measured that needs one which
is not right.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from bench.processes import ROOT, end, start

GRACE = 30.0  # seconds for the case at hand, once a part's share is over; the whole session has none
QUIT = 5.0  # seconds from being asked to end until a part is ended
# The operators that a suite asks for, one of which must be right.
NEEDS = {
    "step": ("conv",),
    "atl": ("gram", "folded"),
    "conv": ("conv",),
    "inference": ("conv",),
    "epoch": ("conv",),
    "linear": ("linear",),
}
OPERATORS = ("conv", "linear", "gram", "folded")  # one of them is in the name of each kernel that is checked


class Part(NamedTuple):
    """One program.

    Args:
        name: what it is called in the log.
        share: seconds of 525 that it may take, in proportion.
        command: its words, of which "{budget}" is replaced by seconds, "{suites}" by those that are measured, and
            "{resume}" by "--resume" once this session has written a results.csv.
        suites: what it measures; it is left out where none of them may be.
        file: where its output is kept too.
    """

    name: str
    share: float
    command: Sequence[str]
    suites: Sequence[str] = ()
    file: str | None = None


def parts(out: Path, commit: str) -> list[Part]:
    """Those of a session on a GPU, in the order of their value."""
    python, name = [sys.executable, "-m"], ["--out", str(out), "--commit", commit]
    measure = [*python, "bench", "run", "{suites}", *name, "--budget", "{budget}", "{resume}"]
    limited = [*name, "--budget", "{budget}"]
    check = [*python, "qkernels.runtime", "--check", "--json", str(out / "check.json")]
    tests = [*python, "bench", "tests", "--out", str(out), "--seconds", "{budget}"]
    # The configuration of the repository names plugins that a GPU machine need not have.
    plain = ["-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    headline = [*python, "pytest", *plain, str(ROOT / "bench"), "-q", "-k", "step or atl"]
    headline.append(f"--benchmark-json={out / 'benchmark.json'}")
    return [
        Part("environment", 10, [*python, "qkernels.runtime"], file="environment.txt"),
        Part("check", 40, check, file="check.txt"),
        Part("step", 100, measure, ["step"]),
        Part("atl", 45, measure, ["atl"]),
        Part("conv", 90, measure, ["conv"]),  # batch 20 before 256, by rank
        Part("tests", 110, tests),
        Part("rest", 40, measure, list(NEEDS)),
        Part("fresh", 40, [*python, "bench", "fresh", *limited], ["step"]),
        Part("share", 30, [*python, "bench", "share", *limited], ["step"]),
        Part("benchmark", 20, headline, ["step"]),
    ]


def run(asked: Sequence[Part], seconds: float, out: Path) -> dict[str, str]:
    """What became of each part: "ok", "exit code N", "out of time", "not begun" (no time is left) or "left out".

    Writes log.txt: what each has printed, and the verdicts.
    """
    begun, wall = time.monotonic(), time.time()
    out.mkdir(parents=True, exist_ok=True)
    verdicts: dict[str, str] = {}

    def written(name: str) -> bool:
        """In this session: an earlier one's kernels or device may have been others."""
        path = out / name
        return path.is_file() and path.stat().st_mtime >= wall

    with (out / "log.txt").open("w") as log:

        def say(text: str) -> None:
            print(text, end="", flush=True)
            log.write(text)
            log.flush()

        for number, part in enumerate(asked):
            left = begun + seconds - time.monotonic()
            share = left * part.share / sum(other.share for other in asked[number:])
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
            with (out / part.file).open("w") if part.file else contextlib.nullcontext() as kept:
                verdicts[part.name] = _run(command, min(left, share + GRACE), say, kept)
            say(f"== {part.name}: {verdicts[part.name]} after {time.monotonic() - start:.0f} s\n")
        say("".join(f"{name:12} {verdict}\n" for name, verdict in verdicts.items()))
    for draft in out.glob(".*.part"):  # of what was ended while it wrote
        draft.unlink()
    return verdicts


def _verdicts(check: Path) -> dict[str, str]:
    """By kernel, "right" or what is wrong with it; of a check that wrote nothing readable, none."""
    try:
        found = json.loads(check.read_text())["kernels"]
        return {str(kernel): str(verdict) for kernel, verdict in found.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}


def _right(suites: Sequence[str], kernels: dict[str, str], say: Callable[[str], None]) -> list[str]:
    """The suites that may be measured; says why the others may not.

    A kernel that is not right spoils the operators that its name has, and all of them where it has none.
    """
    spoilt: dict[str, str] = {}
    for kernel, verdict in kernels.items():
        if verdict != "right":
            named = [operator for operator in OPERATORS if operator in kernel.lower()]
            spoilt |= dict.fromkeys(named or OPERATORS, f"{kernel}: {verdict}")
    measured = []
    for suite in suites:
        reasons = [spoilt[operator] for operator in NEEDS[suite] if operator in spoilt]
        if len(reasons) < len(NEEDS[suite]):
            measured.append(suite)
        else:
            say(f"== the suite {suite} is not measured: {'; '.join(reasons)}\n")
    return measured


def _run(command: Sequence[str], seconds: float, say: Callable[[str], None], kept: IO[str] | None) -> str:
    """How a program ended."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    process = start(command, environment, stdin=null, stdout=pipe, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    reader = threading.Thread(target=_copy, args=(process.stdout, say, kept), daemon=True)
    reader.start()
    try:
        code = process.wait(seconds)
        return f"exit code {code}" if code else "ok"
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(QUIT)
        return "out of time"
    finally:
        end(process)
        reader.join(QUIT)


def _copy(lines: Iterable[str], say: Callable[[str], None], kept: IO[str] | None) -> None:
    with contextlib.suppress(ValueError):  # of files that are closed, by when the part is over
        for line in lines:
            say(line if line.endswith("\n") else f"{line}\n")
            if kept:
                kept.write(line)
                kept.flush()
