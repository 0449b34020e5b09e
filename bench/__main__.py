"""`python -m bench`: measure, compare and show. Its commands need PyTorch, numpy, and Triton on a GPU.

Exit codes: 0 done; 1 a result was wrong, a test failed or something got slower; 2 bad input.
"""

import argparse
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import fresh, gpu_tests, session, sharing
from bench import run as runs
from bench.results import Row, git_commit, provenance, read, write
from bench.suites import HEADLINE, SUITES, chosen
from bench.targets import Target, targets
from bench.timing import GpuClock, clock_of

CASE_SECONDS = 90.0
Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    parser, commands = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(commands[options.command](options))
    except (ValueError, OSError) as error:
        print(f"bench {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> tuple[argparse.ArgumentParser, dict[str, Command]]:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    top = parser.add_subparsers(dest="command", required=True)
    gpu = torch.cuda.is_available()

    def command(name: str, help_: str, out: bool = True) -> argparse.ArgumentParser:
        sub = top.add_parser(name, help=help_, description=help_)
        if out:
            sub.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results (%(default)s)")
        return sub

    command("list", "The suites, and how many cases and which providers they have.", out=False)

    sub = command("run", "Measure suites.")
    sub.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all that this machine can by default")
    sub.add_argument("--budget", type=float, default=math.inf, help="seconds; says what does not fit")
    sub.add_argument("--commit", help="what is measured, where git cannot tell")
    sub.add_argument("--smoke", action="store_true", help="tiny cases on the CPU, judged and not timed")
    sub.add_argument("--resume", action="store_true", help="keep the rows of an earlier run and measure what it lacks")

    sub = command("fresh", "First call and all memory of the headline cases, each in a new process.")
    sub.add_argument("--budget", type=float, default=math.inf, help="seconds; says what does not fit")
    sub.add_argument("--commit", help="what is measured, where git cannot tell")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    sub.add_argument("--only", type=int, help=argparse.SUPPRESS)

    sub = command("share", "Trainings an hour of this device, by how many processes share it.")
    sub.add_argument("--budget", type=float, default=math.inf, help="seconds; says what does not fit")
    sub.add_argument("--commit", help="what is measured, where git cannot tell")

    sub = command("tests", "The tests of tests/gpu, one process a file.")
    sub.add_argument("--seconds", type=float, default=240, help="after which what still runs is ended (%(default)s)")

    sub = command("launches", "What a training step launches on a GPU, by part; counted without one.", out=False)
    sub.add_argument("--json", action="store_true", help="for a program")

    help_ = "The time of a training step on a GPU by arithmetic, launch by launch: computed, not measured."
    sub = command("model", help_, out=False)
    sub.add_argument("--json", action="store_true", help="the sums, for a program")
    sub.add_argument("--arch", type=int, choices=[80, 90, 100], default=90, help="compute capability (%(default)s)")

    sub = command("session", "All of it on a GPU, the most valuable first: what `make gpu` does.")
    sub.add_argument("--seconds", type=float, default=525, help="after which all is ended (%(default)s)")
    sub.add_argument("--commit", help="what is measured, where git cannot tell")

    sub = command(
        "report", "Results as charts and tables: those of bench/results in docs and README.md, or one's own.", out=False
    )
    sub.add_argument("folder", nargs="?", type=Path, help="with a results.csv: write report.md there, and print it")

    sub = command("compare", "What got slower, faster, larger or wrong from one result to another.", out=False)
    for name in ("before", "after"):
        sub.add_argument(name, help="a folder of results, or a git revision whose committed results are meant")
    return parser, {
        "list": _list,
        "run": _run,
        "fresh": _fresh,
        "share": _share,
        "tests": _tests,
        "launches": _launches,
        "model": _model,
        "session": _session,
        "report": _report,
        "compare": _compare,
    }


def _list(options: argparse.Namespace) -> int:
    for name, suites in SUITES.items():
        for suite in suites:
            print(f"{name:10} {len(suite.cases):4} cases; {', '.join(p.name for p in suite.providers)}")
    return 0


def _run(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.budget
    device = torch.device("cuda" if torch.cuda.is_available() and not options.smoke else "cpu")
    suites = chosen(options.suites, device, options.smoke)
    extra = provenance(options.commit)
    kept = []
    if options.resume and (options.out / "results.csv").is_file():
        earlier = read(options.out)
        for name in ("device", "threads", "commit", "torch", "triton"):
            if earlier.provenance[name] != extra[name]:
                raise ValueError(
                    f"{options.out}: its rows were measured with {name} {earlier.provenance[name]}, this is "
                    f"{extra[name]}; choose another folder"
                )
        kept = earlier.rows
    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    clock = roof = None
    if not options.smoke:
        clock = clock_of(device)
        precisions = ("bf16", "fp16", "tf32", "float32") if device.type == "cuda" else ("float32",)
        roof = clock.roof(precisions)
        extra |= {"roof_bandwidth": f"{roof.bandwidth:.4g}"}
        extra |= {f"roof_{precision}": f"{rate:.4g}" for precision, rate in roof.flops.items()}
        rates = ", ".join(f"{precision} {1e-12 * rate:.3g} TFLOP/s" for precision, rate in roof.flops.items())
        print(f"roof: copy {1e-12 * roof.bandwidth:.3g} TB/s, {rates}", flush=True)
        if isinstance(clock, GpuClock):
            print(f"an empty graph takes {clock.empty_graph():.1f} us", flush=True)
    whole = runs.Session(suites, device, clock, roof, deadline)
    rows = list(kept)
    done = {row.case[:-1] for row in kept}
    for new in runs.smoke(suites) if options.smoke else _measured(options, rows, done, extra, whole):
        rows += new
        print(*map(runs.line, new), sep="\n", flush=True)
        write(options.out / "results.csv", rows, extra)
        if whole.device.type == "cuda" or options.smoke:
            write(options.out / "targets.csv", targets(rows), extra)
    if device.type == "cuda":
        _print_targets(targets(rows))
    return int(any(row.status in ("REFUSED", "failed") for row in rows))


def _print_targets(judged: list[Target]) -> None:
    for target in judged:
        print(f"{target.target:72} {target.wanted:32} {target.measured:6} {target.worst:18} {target.verdict}")


def _measured(
    options: argparse.Namespace, rows: list[Row], done: set[Any], extra: dict[str, str], whole: runs.Session
) -> Iterator[list[Row]]:
    """The rows of one case after the other; on a GPU, one that kills or hangs the device costs its own rows only.

    Such a case is noted as failed before it starts. If it takes over `CASE_SECONDS`, or the device is lost, this
    program starts itself anew, and goes on behind it.
    """
    for case, providers, moved in whole.planned(done):
        if whole.device.type == "cuda":
            noted = [*rows, *runs.unmeasured(case, providers, "failed")]
            write(options.out / "results.csv", noted, extra)
            watchdog = threading.Timer(CASE_SECONDS, _start_anew, (options, whole.deadline, f"{case}: hangs"))
            watchdog.daemon = True
            watchdog.start()
        new = runs.measure(case, providers, whole.device, whole.clock, whole.roof, moved)
        if whole.device.type == "cuda":
            watchdog.cancel()
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                _start_anew(options, whole.deadline, f"{case}: {error}")
        yield new


def _start_anew(options: argparse.Namespace, deadline: float, why: str) -> None:
    print(f"starting anew: {why}", file=sys.stderr, flush=True)
    commit = ["--commit", options.commit] if options.commit else []
    budget = ["--budget", str(max(0.0, deadline - time.monotonic()))]
    command = [sys.executable, "-m", "bench", "run", *options.suites, "--out", str(options.out), *budget, *commit]
    os.execv(sys.executable, [*command, "--resume"])


def _fresh(options: argparse.Namespace) -> int:
    headline = HEADLINE[options.device]
    device = torch.device(options.device)
    if options.only is not None:
        case, provider = headline[int(options.only)]
        fresh.report(case, provider, device)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    extra = provenance(options.commit)
    rows: dict[int, fresh.Fresh] = {}
    for number, row in fresh.measured(headline, device, time.monotonic() + options.budget):
        rows[number] = row
        print(_words(row), flush=True)
        write(options.out / "fresh.csv", rows.values(), extra)
    return int(any(row.status == "failed" for row in rows.values()))


def _share(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.budget
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    extra = provenance(options.commit)
    rows: list[sharing.Shared] = []
    with sharing.terminating():
        for new in sharing.measured(sharing.cases(device), device, torch.get_num_threads(), deadline):
            known = {row._replace(trainings_relative=None) for row in rows}
            for row in new:
                if row._replace(trainings_relative=None) not in known:
                    print(_words(row), flush=True)
            rows = new
            write(options.out / "sharing.csv", rows, extra)
    if device.type == "cuda" and (options.out / "results.csv").is_file():
        steps = read(options.out)
        judged = targets(steps.rows, rows)
        write(options.out / "targets.csv", judged, steps.provenance)
        _print_targets(judged)
    return int(any(row.status == "failed" for row in rows))


def _tests(options: argparse.Namespace) -> int:
    with sharing.terminating():
        return gpu_tests.main(options.out, options.seconds)


def _session(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("needs a CUDA device, and there is none")
    out = options.out.resolve()
    # Once for all: results that git knows of make the tree another one as they are written.
    asked = session.parts(out, options.commit or git_commit())
    with sharing.terminating():
        verdicts = session.run(asked, options.seconds, out)
    return int(any(verdict != "ok" for verdict in verdicts.values()))


def _words(row: NamedTuple) -> str:
    """What is known of a row."""
    return ", ".join(f"{name} {value}" for name, value in row._asdict().items() if value not in (None, ""))


def _launches(options: argparse.Namespace) -> int:
    from bench import launches

    if options.json:
        print(json.dumps({"cases": [launches.plain(case) for case in launches.cases()]}, indent=1))
    else:
        for line in launches.report(launches.cases()):
            print(line, flush=True)
    return 0


def _model(options: argparse.Namespace) -> int:
    from bench import launches, model

    if options.json:
        print(json.dumps({"cases": [model.plain(case, options.arch) for case in launches.cases()]}, indent=1))
    else:
        for line in model.report(launches.cases(), options.arch):
            print(line, flush=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    from bench.report import page, write_report

    if options.folder is None:
        write_report(Path("bench/results"), Path("docs"), Path("README.md"))
        return 0
    path = page(options.folder)
    print(re.sub(r"^!\[.*\n\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    print(path)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from bench import compare

    found = compare.compare(compare.load(options.before), compare.load(options.after))
    print(compare.text(found))
    return int(bool(found.regressions))


if __name__ == "__main__":
    sys.exit(main())
