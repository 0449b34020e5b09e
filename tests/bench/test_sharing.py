"""Trainings side by side: what is made of the windows, how processes start and end, and one real run."""

import contextlib
import csv
import math
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import __main__ as cli
from bench import sharing
from bench.network import EPOCHS, NetworkCase
from bench.processes import Worker, terminating
from bench.results import Shared, write
from bench.sharing import MPS, PROCESSES, Setting, Window
from tests.bench.measurements import GPU as GPU_NAMED
from tests.bench.measurements import row, shared
from tests.bench.programs import gone, running

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CASE = sharing.cases(CPU)[0]
TINY = replace(CASE.tiny(), variant="tiny")
TWO_CORES = sharing.plan(CPU, 2)
RECEIVE = Worker.receive


def test_the_cases_are_of_the_promised_network() -> None:
    assert [(case.width, case.at, case.network, case.precision) for case in sharing.cases(CPU)] == [
        (1 / 8, 2, "quaternion", "float32")
    ]
    found = sharing.cases(GPU)
    assert found
    assert all((case.width, case.at, case.network, case.batch) == (1, 2, "quaternion", 20) for case in found)
    assert all(case in EPOCHS.cases for case in found)
    precisions = [case.precision for case in found]
    assert precisions == sorted(set(precisions), key=("bf16", "float32").index)


def test_processes_share_the_cores() -> None:
    assert sharing.plan(CPU, 4) == {PROCESSES: [(PROCESSES, 1, 4), (PROCESSES, 1, 1), (PROCESSES, 4, 1)]}
    assert sharing.plan(CPU, 1) == {PROCESSES: [(PROCESSES, 1, 1)]}
    assert sharing.plan(GPU, 6) == {
        PROCESSES: [(PROCESSES, 1, 6), (PROCESSES, 8, 1), (PROCESSES, 4, 1), (PROCESSES, 2, 3)],
        MPS: [(MPS, 8, 1), (MPS, 16, 1), (MPS, 4, 1), (MPS, 2, 3)],
    }


def test_runs_that_begin_within_the_window_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    calls = []

    def run() -> None:
        calls.append(now[0])
        now[0] += 1.0 if len(calls) < 4 else 50.0

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert sharing.runs_per_second(run, 2.5) == pytest.approx(3 / 3.0)
    assert calls == [0.0, 1.0, 2.0, 3.0]  # the last keeps the device busy


def test_rows_are_medians_over_one_that_is_alone() -> None:
    alone, two, broken = (Setting(PROCESSES, n, 1) for n in (1, 2, 4))
    other = replace(CASE, precision="bf16")
    found = {
        (CASE, alone): [Window(10.0), Window(30.0), Window(20.0)],
        (CASE, two): [Window(50.0, 7)],
        (CASE, broken): [Window(status="failed")],
        (other, alone): [Window(100.0, 1)],
        (other, two): [Window(90.0, 1)],
    }
    rows = sharing.rows(found)
    sizes = {"samples_per_second": 50.0, "trainings_relative": 2.5, "peak_bytes": 7}
    assert rows[1] == Shared(**CASE.case, mode=PROCESSES, processes=2, threads_each=1, status="ok", **sizes)
    assert [(row.samples_per_second, row.trainings_relative, row.status) for row in rows] == [
        (20.0, 1.0, "ok"), (50.0, 2.5, "ok"), (None, None, "failed"), (100.0, 1.0, "ok"), (90.0, 0.9, "ok"),
    ]  # fmt: skip
    del found[CASE, alone]
    assert sharing.rows({(CASE, alone): [Window(status="failed")], **found})[1].trainings_relative is None
    assert sharing.most(rows, "float32") == rows[1]
    assert sharing.most(rows, "tf32") is None
    assert sharing.most([replace(rows[1], status="failed"), rows[0]], "float32") == rows[0]


# Windows


class Process:
    """What a worker's process is to the one that started it."""

    exitcode = None
    pid = 2**30  # of nobody

    def __init__(self) -> None:
        self.killed = False

    def kill(self) -> None:
        self.killed = True

    def join(self) -> None:
        pass


@pytest.fixture
def workers() -> Any:
    """Workers that answer with a report each; one named "dies" or "hangs" does not."""

    def start(*names: Any) -> Any:
        made = []
        for name in names:
            here, there = multiprocessing.Pipe()
            threading.Thread(target=answer, args=(name, there, told), daemon=True).start()
            made.append(Worker(Process(), here))
        return made

    told: list[Any] = []
    start.told = told
    return start


def answer(name: Any, pipe: Any, told: Any) -> None:
    with contextlib.suppress(EOFError):
        while True:
            told.append((name, *pipe.recv()))
            if name == "dies":
                pipe.close()
                return
            if name != "hangs":
                pipe.send((float(name), 10 * int(name)))


def test_a_window_is_the_sum_of_its_processes(workers: Any) -> None:
    three = workers("1", "2", "4")
    before = time.time()
    assert sharing._window(three, Setting(PROCESSES, 2, 8), 4.5) == Window(3.0, 20)
    (one, *rest), (two, *same) = sorted(workers.told)
    assert (one, two) == ("1", "2")
    assert rest == same == [rest[0], 4.5, 8]
    assert before < rest[0] < time.time() + 1  # they start together, when all have been told
    assert sharing._window(three, Setting(PROCESSES, 3, 8), 4.5).rate == 7.0


@pytest.mark.parametrize(("what", "status"), [("dies", "failed"), ("hangs", "out of time")])
def test_a_process_costs_its_window_only(workers: Any, monkeypatch: pytest.MonkeyPatch, what: str, status: str) -> None:
    monkeypatch.setattr(sharing, "WINDOW_SECONDS", 0.4)
    three = workers("1", what, "4")
    ended = three[1]
    assert sharing._window(three, Setting(PROCESSES, 1, 1), 0.1) == Window(1.0, 10)
    assert sharing._window(three, Setting(PROCESSES, 3, 1), 0.1) == Window(status=status)
    assert ended.process.killed
    assert len(three) == 2
    # Those that are left have no old report in their pipes.
    assert sharing._window(three, Setting(PROCESSES, 2, 1), 0.1) == Window(5.0, 40)
    assert sharing._window(three, Setting(PROCESSES, 3, 1), 0.1) == Window(status="failed")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pools whose windows are scripted; which pools were opened, and with what environment."""

    def script(results: Any) -> Any:
        pending = {setting: list(found) for setting, found in results.items()}

        @contextlib.contextmanager
        def pool(case: Any, device: Any, count: Any, environment: Any, deadline: Any) -> Any:
            opened.append((count, environment))
            yield ["a worker"]

        def window(workers: Any, setting: Any, seconds: Any) -> Any:
            assert seconds in sharing.SECONDS.values()
            return pending[setting].pop(0)

        monkeypatch.setattr(sharing, "_pool", pool)
        monkeypatch.setattr(sharing, "_window", window)
        return opened

    opened: list[Any] = []
    return script


def test_settings_take_turns_and_a_right_window_is_enough(scripted: Any) -> None:
    whole, one, both = sharing.plan(CPU, 2)[PROCESSES]
    right = Window(10.0)
    failed = Window(status="failed")
    opened = scripted({
        whole: [right, Window(40.0), Window(20.0)],
        one: [failed, Window(30.0), failed],
        both: [failed, failed, Window(status="out of time")],
    })  # fmt: skip
    steps = list(sharing.measured([CASE], CPU, 2, math.inf))
    assert opened == [(2, {})]
    assert [len(rows) for rows in steps] == [1, 2, 3] + [3] * 6
    assert [rows[0].samples_per_second for rows in steps[::3]] == [10.0, 25.0, 20.0]
    assert [(row.status, row.samples_per_second, row.trainings_relative) for row in steps[-1]] == [
        ("ok", 20.0, 1.0), ("ok", 30.0, 1.5), ("out of time", None, None),
    ]  # fmt: skip


def test_what_is_out_of_time_is_said(
    scripted: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = scripted({setting: [Window(1.0)] for setting in sharing.plan(CPU, 2)[PROCESSES]})
    assert list(sharing.measured([CASE], CPU, 2, time.monotonic())) == []
    assert not opened
    assert capsys.readouterr().out == f"dropped, out of budget: 3 rows of {CASE}, processes\n"
    clock = iter([0.0, 0.0, 2.0])  # before the pool, before the first window, before the second
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    (rows,) = sharing.measured([CASE], CPU, 2, 1.0)
    assert len(rows) == 1
    assert "out of budget: 2 rows" in capsys.readouterr().out


def test_without_mps_the_other_rows_are_measured(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    opened = scripted({setting: [Window(1.0, 5)] for setting in sharing.plan(GPU, 16)[PROCESSES]})
    *_, rows = sharing.measured([CASE], GPU, 16, math.inf)
    assert opened == [(8, {})]
    assert [(row.mode, row.processes, row.samples_per_second) for row in rows] == [
        *((PROCESSES, n, 1.0) for n in (1, 8, 4, 2)), *((MPS, n, None) for n in (8, 16, 4, 2))
    ]  # fmt: skip
    assert {row.status for row in rows[4:]} == {
        "no MPS: [Errno 2] No such file or directory: 'nvidia-cuda-mps-control'"
    }


def test_what_keeps_all_processes_from_starting_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def pool(*arguments: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(sharing, "_pool", pool)
    assert cli.main(["share", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "bench share: no more processes\n"


# The service


SERVICE = """#!/bin/sh
if [ "$1" = -f ]; then
  [ "$BROKEN" ] && echo "one line" && echo "no permission" && exit 1
  sleep 600 & echo "$$ $!" > "$NOTES/pids"
  touch "$CUDA_MPS_PIPE_DIRECTORY/control"; wait
fi
read command
[ -e "$CUDA_MPS_PIPE_DIRECTORY/control" ] && [ -d "$CUDA_MPS_LOG_DIRECTORY" ] || exit 1
echo "$command" >> "$NOTES/asked"
[ "$command" = get_server_list ] && echo "$SERVERS"
exit 0
"""


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A program in place of NVIDIA's, which does not care to quit; its notes."""
    program = tmp_path / sharing.MPS_CONTROL
    program.write_text(SERVICE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("NOTES", str(tmp_path))
    monkeypatch.setenv("SERVERS", "12345")
    return tmp_path


def test_the_service_ends_with_its_context(service: Any) -> None:
    used = []

    def use() -> None:
        with sharing.mps() as environment:
            used.append(environment)
            assert running((service / "pids").read_text())
            raise KeyError

    with pytest.raises(KeyError):
        use()
    (environment,) = used
    assert set(environment) == {"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"}
    assert (service / "asked").read_text().split()[-1] == "quit"
    assert gone((service / "pids").read_text())
    assert not any(map(os.path.exists, environment.values()))
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_a_service_that_does_not_start_says_why(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(OSError, match=r"^nvidia-cuda-mps-control does not start: no permission$"), sharing.mps():
        pass


def test_rows_through_the_service_need_its_server(scripted: Any, service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = {setting: [Window(1.0, 5)] for settings in sharing.plan(GPU, 4).values() for setting in settings}
    opened = scripted(windows)
    *_, rows = sharing.measured([CASE], GPU, 4, math.inf)
    assert {row.status for row in rows} == {"ok"}
    assert [sorted(environment) for _, environment in opened] == [
        [], ["CUDA_MPS_LOG_DIRECTORY", "CUDA_MPS_PIPE_DIRECTORY"]
    ]  # fmt: skip
    # CUDA goes on without the service where it cannot reach it: such a figure would be of time slices.
    monkeypatch.setenv("SERVERS", "")
    scripted(windows)
    *_, rows = sharing.measured([CASE], GPU, 4, math.inf)
    assert [row.status for row in rows if row.mode == MPS] == ["no MPS: no process came to it"] * 4
    assert gone((service / "pids").read_text())


# Processes


def test_a_process_is_warm_before_it_is_ready_and_takes_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def receive() -> Any:
        if not windows:
            raise EOFError
        return windows.pop(0)

    def run() -> None:
        epochs.append((len(said), torch.get_num_threads()))

    epochs, said, windows, before = [], [], [(0.0, 0.0, 2), (0.0, 0.0, 1)], torch.get_num_threads()
    pipe = SimpleNamespace(send=said.append, recv=receive)
    monkeypatch.setattr(sharing, "OURS", sharing.OURS._replace(build=lambda case, operands: run))
    monkeypatch.setenv("SHARED", "no")
    try:
        sharing._serve(pipe, TINY, "cpu", {"SHARED": "yes"})
    finally:
        torch.set_num_threads(before)
    assert epochs == [(0, before)] * sharing.WARM + [(1, 2), (2, 1)]
    assert os.environ["SHARED"] == "yes"
    assert said[0] == "ready"
    assert said[1:] == [(0.0, None)] * 2  # of windows without length


def with_child(pipe: Any) -> None:
    os.setsid()
    pipe.send(subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)


def test_a_process_ends_with_all_that_it_started() -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=with_child, args=(there,), daemon=True)
    process.start()
    child = here.recv()
    worker = Worker(process, here)
    worker.end()
    worker.end()
    assert process.exitcode == -signal.SIGKILL
    assert gone(str(child))


def test_sigterm_ends_what_was_started() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ended = []

    def wait() -> None:
        with terminating():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                ended.append(True)

    with pytest.raises(SystemExit):
        wait()
    assert ended
    assert signal.getsignal(signal.SIGTERM) == before


def test_who_does_not_start_costs_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    started, ended, limits = [], [], []

    class Started:
        def __init__(self, target: Any, args: Any, daemon: Any) -> None:
            self.pipe, self.name = args[2], len(started)
            started.append(self)

        def start(self) -> None:
            if self.name != 1:
                self.pipe.send("ready")

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Started)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(Worker, "end", lambda self: ended.append(self.process.name))
    monkeypatch.setattr(Worker, "receive", lambda self, until: limits.append(until) or RECEIVE(self, until))
    now = time.monotonic()
    with sharing._pool(CASE, CPU, 3, {}, now + 2.0) as ready:
        assert [worker.process.name for worker in ready] == [0, 2]
        assert ended == [1]
    assert sorted(ended) == [0, 1, 1, 2]
    assert limits == [pytest.approx(now + 1.0, abs=0.3)] * 3


def test_on_a_gpu_the_promised_figure_is_judged_beside_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "provenance", lambda commit: GPU_NAMED)
    lines = [shared(1, 1.0), shared(8, 4.5, mode=MPS)]
    monkeypatch.setattr(sharing, "measured", lambda *of: iter([lines[:1], lines]))
    assert cli.main(["share", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["sharing.csv"]
    write(tmp_path / "results.csv", [row()], {**GPU_NAMED, "commit": "of the run"})
    assert cli.main(["share", "--out", str(tmp_path)]) == 0
    with (tmp_path / "targets.csv").open() as file:
        (line,) = [line for line in csv.DictReader(file) if "side by side" in line["target"]]
    assert (line["measured"], line["verdict"], line["commit"]) == ("4.50", "met", "of the run")
    assert "4.50   MPS, 8: 4.50" in capsys.readouterr().out


@dataclass(frozen=True, kw_only=True)
class Once(NetworkCase):
    """Only one process can make its operands."""

    folder: str = ""

    def operands(self, device: Any) -> Any:
        os.mkdir(self.folder)
        return super().operands(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_real_run_in_which_one_process_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    case = Once(**{**vars(TINY), "folder": str(tmp_path / "taken")})
    monkeypatch.setattr(sharing, "cases", lambda device: [case])
    monkeypatch.setattr(sharing, "plan", lambda device, cores: TWO_CORES)
    monkeypatch.setattr(sharing, "SECONDS", {"cpu": 0.2})
    monkeypatch.setattr(sharing, "ROUNDS", {"cpu": 1})
    assert cli.main(["share", "--commit", "abc", "--out", str(tmp_path)]) == 1
    out, errors = capfd.readouterr()
    assert "FileExistsError" in errors
    assert "processes 2, threads_each 1, status failed" in out
    with (tmp_path / "sharing.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["processes"], line["threads_each"], line["status"]) for line in lines] == [
        ("1", "2", "ok"), ("1", "1", "ok"), ("2", "1", "failed")
    ]  # fmt: skip
    assert all(float(line["samples_per_second"]) > 0 for line in lines[:2])
    assert (lines[0]["variant"], lines[0]["trainings_relative"], lines[0]["commit"]) == ("tiny", "1.0", "abc")
    assert lines[2]["samples_per_second"] == lines[2]["peak_bytes"] == ""
    assert not multiprocessing.active_children()
    assert not (tmp_path / "targets.csv").exists()
