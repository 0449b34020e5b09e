"""`python -m bench session`, with stand-ins for its parts."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as cli
from bench import session
from bench.session import Part
from bench.suites import ON_CPU, SUITES
from tests.bench.programs import gone

CHECK = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"


def python(code: Any, *words: Any) -> Any:
    return [sys.executable, "-c", code, *map(str, words)]


def told(name: Any, suites: Any = ()) -> Any:
    """A part that prints what it is asked."""
    words = ("{budget}", "{suites}", "{resume}")
    return Part(name, 1, python("import sys; print('asked', sys.argv[1:])", *words), suites)


def asked(out: Any) -> Any:
    """What such parts have printed."""
    return [line.removeprefix("asked ") for line in (out / "log.txt").read_text().splitlines() if "asked [" in line]


HANGS = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
print("pids", os.getpid(), child.pid)
child.wait()
"""


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(session, "GRACE", 0.2)
    monkeypatch.setattr(session, "QUIT", 0.2)
    out = tmp_path / "new" / "out"
    parts = [
        Part("prints", 1, python("print('first'); print('second')"), file="kept.txt"),
        Part("fails", 1, python("import sys; print('told before', end=''); sys.exit(1)")),
        Part("hangs", 0.2, python(HANGS)),
        Part("is no program", 1, python("import nowhere")),
        Part("comes last", 1, python("open('/dev/stdout', 'wb').write(bytes([255, 10]))")),
    ]
    start = time.monotonic()
    verdicts = session.run(parts, 60, out)
    assert verdicts == {
        "prints": "ok",
        "fails": "exit code 1",
        "hangs": "out of time",
        "is no program": "exit code 1",
        "comes last": "ok",
    }
    assert time.monotonic() - start < 50
    assert (out / "kept.txt").read_text() == "first\nsecond\n"
    log = (out / "log.txt").read_text()
    assert capfd.readouterr().out == log
    assert "first\nsecond\n" in log
    assert "told before\n== fails: exit code 1 after " in log
    assert "No module named 'nowhere'" in log
    assert "hangs        out of time\n" in log
    assert gone(log.split("pids ")[1].splitlines()[0])


def test_what_is_left_running_ends_with_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "QUIT", 5.0)
    leaves = "import subprocess; print('pids', subprocess.Popen(['sleep', '600']).pid)"
    assert session.run([Part("leaves", 1, python(leaves))], 60, tmp_path) == {"leaves": "ok"}
    assert gone((tmp_path / "log.txt").read_text().split("pids ")[1].split()[0])


def test_shares_are_of_the_time_that_is_left_and_the_end_is_hard(tmp_path: Path) -> None:
    """Half of 100 s; of what is left by then, nearly all."""
    verdicts = session.run([told("first"), told("second")], 100, tmp_path)
    first, second = (int(line.split("'")[1]) for line in asked(tmp_path))
    assert first == 50
    assert 90 <= second <= 100
    slow = Part("slow", 1, python("import time; time.sleep(60)"))
    start = time.monotonic()
    verdicts = session.run([slow, told("late")], 2, tmp_path)
    assert verdicts == {"slow": "out of time", "late": "not begun"}
    assert time.monotonic() - start < 10


def test_results_of_this_session_are_gone_on_with_and_no_others(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    results.write_text("old")
    os.utime(results, (0, 0))
    writes = Part("writes", 1, python("import sys; open(sys.argv[1], 'w').write('new')", results))
    (tmp_path / ".results.csv.1.part").write_text("half")
    session.run([told("before"), writes, told("behind")], 60, tmp_path)
    before, behind = asked(tmp_path)
    assert "--resume" not in before
    assert "'--resume'" in behind
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["log.txt", "results.csv"]


@pytest.mark.parametrize(
    ("kernels", "measured"),
    [
        ({"conv forward bf16": "right", "gram float32": "right"}, ["step", "atl", "conv", "linear"]),
        ({"hamilton_conv dx bf16": "wrong", "hamilton_conv dw bf16": "right"}, ["atl", "linear"]),
        ({"Linear forward": "failed: CompilationError"}, ["step", "atl", "conv"]),
        ({"gram": "wrong", "folded": "right"}, ["step", "atl", "conv", "linear"]),
        ({"gram": "wrong", "folded": "wrong"}, ["step", "conv", "linear"]),
        ({"pack": "wrong"}, []),
    ],
)
def test_nothing_is_measured_that_needs_a_kernel_that_is_not_right(kernels: Any, measured: Any, tmp_path: Path) -> None:
    suites = ["step", "atl", "conv", "linear"]
    check = Part("check", 1, python(CHECK, tmp_path / "check.json", json.dumps({"kernels": kernels})))
    one = [told(suite, [suite]) for suite in suites]
    verdicts = session.run([check, *one, told("all", suites), told("none")], 60, tmp_path)
    assert verdicts == {
        "check": "ok",
        **{suite: "ok" if suite in measured else "left out" for suite in suites},
        "all": "ok" if measured else "left out",
        "none": "ok",
    }
    given = [[word for word in suites if f"'{word}'" in line] for line in asked(tmp_path)]
    assert given == [*([suite] for suite in measured), *([measured] if measured else []), []]
    log = (tmp_path / "log.txt").read_text()
    for suite in set(suites) - set(measured):
        assert f"== the suite {suite} is not measured: {next(k for k in kernels if kernels[k] != 'right')}: " in log


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"kernels": 1}', '{"kernels": null}'])
def test_a_check_that_says_nothing_of_kernels_is_no_verdict_on_them(text: str | None, tmp_path: Path) -> None:
    """Nor is that of an earlier session; what is measured then is judged by the benchmark itself."""
    check = tmp_path / "check.json"
    check.write_text(json.dumps({"kernels": {"conv": "wrong"}}))
    os.utime(check, (0, 0))
    fails = Part("check", 1, python("raise SystemExit(1)" if text is None else CHECK, check, text or ""))
    verdicts = session.run([fails, told("step", ["step"])], 60, tmp_path)
    assert verdicts == {"check": "exit code 1" if text is None else "ok", "step": "ok"}


def test_the_parts_are_commands_and_all_suites_are_among_them(tmp_path: Path) -> None:
    parts = session.parts(tmp_path, "abc")
    assert [part.name for part in parts[:5]] == ["environment", "check", "step", "atl", "conv"]
    assert sum(part.share for part in parts) == 525
    assert {*session.NEEDS, *ON_CPU} == set(SUITES)
    measured = [part.suites for part in parts if "{suites}" in part.command]
    assert measured == [["step"], ["atl"], ["conv"], list(session.NEEDS)]
    parser = cli.parser()
    known = {"{suites}": ["step", "conv"], "{budget}": ["10"], "{resume}": ["--resume"]}
    for part in parts:
        program, *words = (new for word in part.command[2:] for new in known.get(word, [word]))
        if program == "bench":
            options = parser.parse_args(words)
            assert options.out == tmp_path
            assert options.command in cli.COMMANDS
            assert getattr(options, "budget", None) or options.seconds == 10
            assert options.command == "tests" or options.commit == "abc"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = []
    some = [Part("prints", 1, python("print('here')")), Part("fails", 1, python("raise SystemExit(3)"))]

    def parts(out: Any, commit: Any) -> Any:
        given.append((out, commit))
        return some[: len(given)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "parts", parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for code in (0, 1):
        assert cli.main(["session", "--seconds", "60", "--out", "here", "--commit", "abc"]) == code
    assert given == [(tmp_path / "here", "abc")] * 2
    assert (tmp_path / "here" / "log.txt").is_file()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capsys.readouterr()
    assert cli.main(["session", "--out", "there"]) == 2
    assert capsys.readouterr().err == "bench session: needs a CUDA device, and there is none\n"
    assert not (tmp_path / "there").exists()


def test_make_gpu_is_this_command() -> None:
    made = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu", "PYTHON=py", "OUT=some/where", "COMMIT=abc"],
        cwd=session.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    [line] = made.stdout.splitlines()
    python, _, program, *words = line.split()
    assert (python, program) == ("py", "bench")
    options = cli.parser().parse_args(words)
    assert (options.command, options.seconds) == ("session", 525)
    assert (options.out, options.commit) == (Path("some/where"), "abc")
