"""`python -m bench`: measure, compare, report. Needs PyTorch and numpy, and Triton on a GPU.

Exit codes: 0: done; 1: a result was wrong, a test failed or something got slower; 2: bad input.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import fresh, gpu_tests, session, sharing
from bench import run as runs
from bench.processes import PYTHON, terminating
from bench.results import Fresh, Row, Shared, git_commit, provenance, read, write
from bench.suites import SUITES, chosen
from bench.targets import targets, targets_on_a_cpu
from bench.timing import GpuClock, clock_of
from qat.files import Busy, held, lock_of
from qat.memory import keep_freed_memory

Command = Callable[[argparse.Namespace], int]
Argument = tuple[str, dict[str, Any]]
COMMANDS: dict[str, tuple[Command, str, tuple[Argument, ...]]] = {}
OUT = "--out", dict(type=Path, default=Path("runs/bench"), help="folder of the results (%(default)s)")
BUDGET = "--budget", dict(type=float, default=math.inf, help="time in seconds; the least valuable rest is dropped")
COMMIT = "--commit", dict(help="measured commit, if git cannot tell")
JSON = "--json", dict(action="store_true", help="print JSON, for programs")


def command(text: str, *arguments: Argument) -> Callable[[Command], Command]:
    """Register the function `_name` as the command `name`, with its help and arguments."""

    def register(function: Command) -> Command:
        COMMANDS[function.__name__.removeprefix("_")] = function, text, arguments
        return function

    return register


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit code."""
    options = parser().parse_args(arguments)
    keep_freed_memory()
    try:
        with terminating(), _only_writer(options):
            return COMMANDS[options.command][0](options)
    except (ValueError, OSError) as error:
        print(f"bench {options.command}: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _only_writer(options: argparse.Namespace) -> Iterator[None]:
    """Nobody else measures the same into the same folder meanwhile; a session has its parts do so."""
    if "out" not in options or options.command == "session":
        yield
        return
    try:
        with held(lock_of(options.out / options.command)):
            yield
    except Busy as error:
        raise ValueError(f"{options.out}: {error} writes there; choose another folder, or wait") from None


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name, (_, text, arguments) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        for flag, options in arguments:
            sub.add_argument(flag, **options)
    return top


@command("List the suites, with number of cases and providers.")
def _list(options: argparse.Namespace) -> int:
    for name, suites in SUITES.items():
        for suite in suites:
            print(f"{name:10} {len(suite.cases):4} cases; {', '.join(p.name for p in suite.providers)}")
    return 0


NAMES = "suites", dict(nargs="*", help=f"of {', '.join(SUITES)}; default: all that this machine can run")
SMOKE = "--smoke", dict(action="store_true", help="tiny cases on the CPU, checked and not timed")
RESUME = "--resume", dict(action="store_true", help="keep the rows of an earlier run and measure the missing ones")


@command("Measure suites.", NAMES, OUT, BUDGET, COMMIT, SMOKE, RESUME)
def _run(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.budget
    device = torch.device("cuda" if torch.cuda.is_available() and not options.smoke else "cpu")
    schedule = runs.Schedule(chosen(options.suites, device, options.smoke), device, deadline)
    origin = provenance(options.commit)
    rows = runs.resumed(options.out, origin) if options.resume else []
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True

    def note(new: Sequence[Row]) -> None:
        write(options.out / "results.csv", [*rows, *new], origin)

    def restart(reason: str) -> None:
        print(f"starting again: {reason}", file=sys.stderr, flush=True)
        commit = ["--commit", options.commit] if options.commit else []
        budget = ["--budget", str(max(0.0, deadline - time.monotonic()))]
        words = ["run", *options.suites, "--out", str(options.out), *budget, *commit, "--resume"]
        os.execv(sys.executable, [*PYTHON, "bench", *words])

    if options.smoke:
        measured = schedule.smoke()
    else:
        clock = clock_of(device)
        roof = clock.roof(("bf16", "fp16", "tf32", "float32") if device.type == "cuda" else ("float32",))
        origin["roof_bandwidth"] = f"{roof.bandwidth:.4g}"
        origin |= {f"roof_{precision}": f"{rate:.4g}" for precision, rate in roof.flops.items()}
        rates = ", ".join(f"{precision} {1e-12 * rate:.3g} TFLOP/s" for precision, rate in roof.flops.items())
        print(f"roof: copy {1e-12 * roof.bandwidth:.3g} TB/s, {rates}", flush=True)
        if isinstance(clock, GpuClock):
            print(f"an empty graph takes {clock.empty_graph():.1f} us", flush=True)
        measured = schedule.measured(clock, roof, list(rows), note, restart)
    for new in measured:
        rows += new
        print(*map(runs.line, new), sep="\n", flush=True)
        note([])
        if device.type == "cuda" or options.smoke:
            write(options.out / "targets.csv", targets(rows), origin)
    if device.type == "cuda":
        print(*targets(rows), sep="\n")
    elif any(row.suite == "cpu" for row in rows) and not options.smoke:
        promised = targets_on_a_cpu(rows)
        write(options.out / "targets.csv", promised, origin)
        print(*promised, sep="\n")
    return int(any(row.status in ("REFUSED", "failed") for row in rows))


DEVICE = "--device", dict(choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")


@command("Measure first call and memory of the headline cases, each in a new process.", OUT, BUDGET, COMMIT, DEVICE)
def _fresh(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    origin = provenance(options.commit)
    rows: dict[int, Fresh] = {}
    for number, row in fresh.measured(options.device, time.monotonic() + options.budget):
        rows[number] = row
        print(_words(row), flush=True)
        write(options.out / "fresh.csv", rows.values(), origin)
    return int(any(row.status == "failed" for row in rows.values()))


@command("Measure trainings per hour on this device, by the number of processes that share it.", OUT, BUDGET, COMMIT)
def _share(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.budget
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    origin = provenance(options.commit)
    rows: list[Shared] = []
    for new in sharing.measured(sharing.cases(device), device, torch.get_num_threads(), deadline):
        printed = {replace(row, trainings_relative=None) for row in rows}
        for row in new:
            if replace(row, trainings_relative=None) not in printed:
                print(_words(row), flush=True)
        rows = new
        write(options.out / "sharing.csv", rows, origin)
    if device.type == "cuda" and (options.out / "results.csv").is_file():
        steps = read(options.out / "results.csv", Row)
        promised = targets(steps.rows, rows)
        write(options.out / "targets.csv", promised, steps.provenance)
        print(*promised, sep="\n")
    return int(any(row.status == "failed" for row in rows))


def _words(row: Fresh | Shared) -> str:
    """The measured fields of a row."""
    return ", ".join(f"{name} {value}" for name, value in vars(row).items() if value not in (None, ""))


def limit(seconds: float) -> Argument:
    return "--seconds", dict(type=float, default=seconds, help="time limit, then programs are killed (%(default)s)")


@command("Run the tests of tests/gpu, one process per file.", OUT, limit(240))
def _tests(options: argparse.Namespace) -> int:
    return gpu_tests.main(options.out, options.seconds)


@command("Count the kernels that a training step launches on a GPU, by part; needs no GPU.", JSON)
def _launches(options: argparse.Namespace) -> int:
    from bench import launches

    return _print(launches.report(), launches.plain() if options.json else None)


ARCH = "--arch", dict(type=int, choices=[80, 90, 100], default=90, help="compute capability (%(default)s)")


@command("Compute the time of a training step on a GPU by a model; not measured, needs no GPU.", JSON, ARCH)
def _model(options: argparse.Namespace) -> int:
    from bench import model

    return _print(model.report(options.arch), model.plain(options.arch) if options.json else None)


def _print(lines: Iterable[str], plain: list[dict[str, Any]] | None) -> int:
    """Print lines as they come, or instead plain data as JSON."""
    for line in lines if plain is None else [json.dumps({"cases": plain}, indent=1)]:
        print(line, flush=True)
    return 0


@command("Run all measurements and tests on a GPU, the most valuable first (`make gpu`).", OUT, COMMIT, limit(525))
def _session(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("needs a CUDA device, and there is none")
    out = options.out.resolve()
    # The commit is read once: results in the repository make the tree dirty as they are written.
    parts = session.parts(out, options.commit or git_commit())
    return int(any(verdict != "ok" for verdict in session.run(parts, options.seconds, out).values()))


FOLDER = "folder", dict(nargs="?", type=Path, help="folder with a results.csv; report.md is written there and printed")


@command("Write charts and tables: of bench/results into docs and README.md, or of one folder.", FOLDER)
def _report(options: argparse.Namespace) -> int:
    from bench.report import write_page, write_readme

    if options.folder is None:
        write_readme(Path("bench/results"), Path("docs"), Path("README.md"))
        return 0
    path = write_page(options.folder)
    print(re.sub(r"^!\[.*\n\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    print(path)
    return 0


SIDES = [(name, dict(help="folder of results, or a git revision with committed ones")) for name in ("before", "after")]


@command("List what got slower, faster, larger or wrong between two results.", *SIDES)
def _compare(options: argparse.Namespace) -> int:
    from bench import compare

    comparison = compare.compare(compare.load(options.before), compare.load(options.after))
    print(comparison)
    return int(bool(comparison.regressions))


if __name__ == "__main__":
    sys.exit(main())
