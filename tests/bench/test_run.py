"""The runner and the command line of the benchmark, without a GPU."""

import contextlib
import csv
import functools
import math
import os
import signal
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qkernels
from bench import __main__ as cli
from bench import fresh, layers, results, run
from bench.case import BACKWARD, FORWARD, STEP, Roof, Suite
from bench.network import STEPS
from bench.processes import Worker
from bench.suites import HEADLINE, SUITES
from bench.targets import Target
from bench.timing import Clock, Timing
from qkernels import runtime
from qkernels.runtime.precision import precision_of

CPU = torch.device("cpu")
TINY = layers.layer_case(layers.Layer("conv 2", 8, 12, 3, 4), "quaternion", 2, "float32", STEP, modes=("eager",))
RIGHT = layers.PROVIDERS[0]
PROVENANCE = {"device", "threads", "commit", "torch", "triton", "cuda", "cudnn", "date"}


class Watch:
    """A clock that notes whom it times."""

    modes = ("graph", "eager")

    def __init__(self) -> None:
        self.timed, self.held = [], 0

    def time(self, runs: Any, mode: Any, energy: bool = False) -> Any:
        self.timed += [(mode, name, len(several)) for name, several in runs.items()]
        return {name: Timing([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 7.0, 0.5 if energy else None) for name in runs}

    def memory(self) -> Any:
        return 100

    def peak(self) -> Any:
        return 1000


def wrong(results: Any) -> Any:
    return (1.001 * results[0], *results[1:])


def build_with(change: Any) -> Any:
    def build(case: Any, operands: Any) -> Any:
        run = RIGHT.build(case, operands)
        return lambda: change(run())

    return build


def test_a_wrong_result_is_given_no_time() -> None:
    watch = Watch()
    providers = [RIGHT, RIGHT._replace(name="ours, wrong", build=build_with(wrong))]
    right, refused = run.measure(TINY, providers, CPU, watch)
    assert (refused.status, refused.median_us, refused.peak_bytes) == ("REFUSED", None, None)
    assert 1e-4 < refused.error < 2e-3
    assert refused.error_over_tolerance > 1
    assert watch.timed == [("eager", "ours auto", TINY.sets)]
    assert (right.status, right.p20_us, right.median_us, right.p80_us, right.samples) == ("ok", 2.0, 3.5, 5.0, 6)
    assert (right.host_us, right.energy_mj, right.peak_bytes) == (7.0, None, 900)


def test_nan_is_refused() -> None:
    nan = RIGHT._replace(build=build_with(lambda results: (results[0] * math.nan, *results[1:])))
    (row,) = run.measure(TINY, [nan], CPU)
    assert row.status == "REFUSED"
    assert row.error_over_tolerance == math.inf


def test_only_the_judged_run_is_checked() -> None:
    """What a case switches off for its check, such as dropout, is on when it is timed."""

    class Checked(layers.LayerCase):
        @contextlib.contextmanager
        def checking(self, operands: Any) -> Any:
            checking.append(True)
            yield
            checking.clear()

    checking, seen = [], []

    def build(case: Any, operands: Any) -> Any:
        run = RIGHT.build(case, operands)
        return lambda: (seen.append(bool(checking)), run())[1]

    case = Checked(**{field.name: getattr(TINY, field.name) for field in fields(TINY)})
    (row,) = run.measure(case, [RIGHT._replace(build=build)], CPU, Watch())
    assert row.status == "ok"
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("error", "status"), [(torch.OutOfMemoryError("no"), "out of memory"), (ZeroDivisionError("no"), "failed")]
)
def test_what_raises_is_a_row_and_the_others_are_measured(
    error: Any, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(case: Any, operands: Any) -> None:
        raise error

    broken, right = run.measure(TINY, [RIGHT._replace(name="broken", build=build), RIGHT], CPU, Watch())
    assert (broken.status, broken.median_us) == (status, None)
    assert right.status == "ok"
    assert ("ZeroDivisionError: no" in capsys.readouterr().err) == (status == "failed")


def test_a_case_that_raises_costs_its_own_rows(capsys: pytest.CaptureFixture[str]) -> None:
    class Lost(layers.LayerCase):
        def operands(self, device: Any) -> None:
            raise RuntimeError("the device is lost")

    case = Lost(**{field.name: getattr(TINY, field.name) for field in fields(TINY)})
    rows = run.measure(replace(case, modes=("graph", "eager")), [RIGHT], CPU, Watch())
    assert [(row.mode, row.provider, row.status) for row in rows] == [
        ("graph", "ours auto", "failed"), ("eager", "ours auto", "failed")
    ]  # fmt: skip
    assert "the device is lost" in capsys.readouterr().err


def test_what_cannot_be_judged_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: Any, provider: Any, operands: Any, results: Any) -> None:
        raise torch.OutOfMemoryError("float64")

    monkeypatch.setattr(layers.LayerCase, "check", check)
    (row,) = run.measure(TINY, [RIGHT], CPU, Watch())
    assert (row.status, row.median_us) == ("not judged", None)


def test_what_cannot_be_captured_has_failed() -> None:
    class NoGraphs(Watch):
        def time(self, runs: Any, mode: Any, energy: bool = False) -> Any:
            return {} if mode == "graph" else super().time(runs, mode, energy)

    rows = run.measure(replace(TINY, modes=("graph", "eager")), [RIGHT], CPU, NoGraphs())
    assert [(row.mode, row.status) for row in rows] == [("graph", "failed"), ("eager", "ok")]


def test_rows_know_the_roof_and_the_floor() -> None:
    roof = Roof(bandwidth=1e9, flops={"float32": 1e9})
    (row,) = run.measure(TINY, [RIGHT], CPU, Watch(), roof, {"ours auto": [100, 9000]})
    assert row.percent_of_roof == pytest.approx(100 * max(TINY.bytes, TINY.flops) / 1e9 / 3.5e-6)
    assert row.floor_us == pytest.approx(3.0 + 9.0)
    # Where the rate of a precision is unknown, bytes decide.
    (row,) = run.measure(replace(TINY, precision="tf32"), [RIGHT], CPU, Watch(), roof)
    assert row.percent_of_roof == pytest.approx(100 * TINY.bytes / 1e9 / 3.5e-6)
    assert row.floor_us is None


def test_the_most_valuable_cases_come_first_and_the_budget_drops_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [replace(TINY, layer=f"conv {n}", rank=rank) for n, rank in enumerate((2, 0, 1))]
    whole = run.Schedule([Suite(cases, [RIGHT])], CPU)
    assert [(case.layer, providers) for case, providers, _ in whole.planned(set())] == [
        ("conv 1", [RIGHT]), ("conv 2", [RIGHT]), ("conv 0", [RIGHT])
    ]  # fmt: skip
    assert [case.layer for case, *_ in whole.planned({cases[1].case_key})] == ["conv 2", "conv 0"]
    assert list(whole._replace(deadline=time.monotonic()).planned(set())) == []
    assert capsys.readouterr().out == "dropped, out of budget: 3 cases of the suite conv\n"


def test_a_provider_that_a_cpu_has_not_is_left_out() -> None:
    signed = next(provider for provider in layers.PROVIDERS if provider.name == "ours signed")
    suite = Suite([], [RIGHT, signed._replace(fits=lambda case: True)])
    assert run.Schedule([suite], CPU).providers(suite, TINY) == [RIGHT]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CPU tensors are planned for as if they lay on a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(runtime, "_obstacle", lambda *tensors: None)
    with qkernels.set_backend("triton"):
        yield


def test_kernels_are_planned_and_not_launched(planned: Any) -> None:
    def names(work: Any) -> Any:
        before, timed = run.recorded_launches(replace(TINY, work=work), RIGHT, CPU)
        return [[launch.kernel.__name__ for launch in part] for part in (before, timed)]

    assert names(FORWARD) == [[], ["_hamilton_pack_kernel", "_hamilton_conv_kernel"]]
    before, timed = names(BACKWARD)
    assert before == names(FORWARD)[1]
    assert {"_hamilton_conv_kernel", "_hamilton_conv_dw_kernel"} <= set(timed)
    assert names(STEP) == [[], before + timed]
    before, timed = run.recorded_launches(replace(TINY, work=FORWARD), RIGHT, CPU)
    x, weight, bias, y, _ = TINY.operands(CPU)
    assert run.tensor_bytes(timed[-1].arguments) >= x.nbytes + weight.nbytes + bias.nbytes + y.nbytes


def test_the_kernels_of_a_whole_step_are_planned(planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def names(**wanted: Any) -> Any:
        case = next(c for c in STEPS.cases if all(getattr(c, name) == value for name, value in wanted.items()))
        before, timed = run.recorded_launches(case.tiny(), STEPS.providers[0], CPU)
        return [{launch.kernel.__name__ for launch in part} for part in (before, timed)]

    gram = {"_gram_kernel", "_gram_finish_kernel", "_gram_backward_kernel"}
    before, timed = names(network="quaternion", layer="AT at layer 2", variant="", work="step")
    assert not before
    assert gram | {"_hamilton_conv_dw_kernel", "_hamilton_conv_kernel"} <= timed
    before, timed = names(network="quaternion", layer="AT at layer 2", variant="cached targets", work="step")
    assert "_hamilton_conv_kernel" in before
    assert capsys.readouterr().err == ""


def test_the_precision_switches_are_set_and_restored() -> None:
    def precisions() -> Any:
        return [precision_of(torch.float32, kind) for kind in ("conv", "matmul")]

    seen, before = [], precisions()

    def build(case: Any, operands: Any) -> Any:
        seen.append(precisions())
        return RIGHT.build(case, operands)

    for precision in ("tf32", "float32"):
        run.measure(replace(TINY, precision=precision), [RIGHT._replace(build=build)], CPU)
    assert seen == [["tf32"] * 2, ["ieee"] * 2]
    assert precisions() == before


def test_smoke_judges_every_suite_and_claims_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a compiled layer computes shows without machine code, which takes 20 s.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert cli.main(["run", "--smoke", "--out", str(tmp_path)]) == 0
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert set(lines[0]) == {*(field.name for field in fields(results.Row)), *PROVENANCE}
    assert {line["suite"] for line in lines} == set(SUITES)
    assert {line["status"] for line in lines} == {"smoke"}
    for name in ("median_us", "p20_us", "p80_us", "samples", "host_us", "first_call_ms", "peak_bytes", "energy_mj",
                 "floor_us", "percent_of_roof"):  # fmt: skip
        assert {line[name] for line in lines} == {""}
    for name, suites in SUITES.items():
        # A form that needs a GPU, and what takes minutes to build, are left out.
        expected = {p.name for s in suites for p in s.providers if p.cpu and p.smoke and any(map(p.fits, s.cases))}
        assert {line["provider"] for line in lines if line["suite"] == name} >= expected - {"materialised, float32"}
        works = {case.work for suite in suites for case in suite.cases}
        assert {line["work"] for line in lines if line["suite"] == name} == works
    with (tmp_path / "targets.csv").open() as file:
        judged = list(csv.DictReader(file))
    assert set(judged[0]) == {*(field.name for field in fields(Target)), *PROVENANCE}
    assert {target["verdict"] for target in judged} == {"not measured"}
    read = results.read(tmp_path / "results.csv", results.Row)
    assert len(read.rows) == len(lines)
    assert set(read.provenance) == PROVENANCE


def test_a_wrong_result_turns_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite([TINY], [RIGHT._replace(build=build_with(wrong))])
    monkeypatch.setattr(cli, "chosen", lambda *_: [suite])
    assert cli.main(["run", "--smoke", "--out", str(tmp_path)]) == 1
    assert results.read(tmp_path / "results.csv", results.Row).rows[0].status == "REFUSED"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`bench run` measures two tiny cases."""
    cases = [TINY, replace(TINY, layer="conv 3", rank=1)]
    monkeypatch.setattr(cli, "chosen", lambda *_: [Suite(cases, [RIGHT])])
    monkeypatch.setattr(Clock, "roof", lambda self, precisions: Roof(1e9, {"float32": 1e9}))
    return cases


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_is_written_and_resumed(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--commit", "abc", "--out", str(tmp_path)]) == 0
    whole = results.read(tmp_path / "results.csv", results.Row)
    assert [(row.layer, row.status) for row in whole.rows] == [("conv 2", "ok"), ("conv 3", "ok")]
    assert all(row.p20_us <= row.median_us <= row.p80_us and row.percent_of_roof > 0 for row in whole.rows)
    assert (whole.provenance["commit"], whole.provenance["roof_bandwidth"]) == ("abc", "1e+09")
    results.write(tmp_path / "results.csv", whole.rows[:1], whole.provenance)
    capsys.readouterr()
    assert cli.main(["run", "--commit", "abc", "--resume", "--out", str(tmp_path)]) == 0
    again = results.read(tmp_path / "results.csv", results.Row)
    assert again.rows[0] == whole.rows[0]
    assert [row.layer for row in again.rows] == ["conv 2", "conv 3"]
    assert "conv 2" not in capsys.readouterr().out
    assert cli.main(["run", "--commit", "def", "--resume", "--out", str(tmp_path)]) == 2
    assert "commit abc, this is def" in capsys.readouterr().err
    assert results.read(tmp_path / "results.csv", results.Row) == again


@pytest.mark.parametrize("hangs", [False, True])
def test_a_lost_or_hanging_device_costs_one_case(hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program starts itself anew, with what is left of the time, and finds the case noted as failed."""
    started = threading.Event()
    commands = []

    def execv(file: Any, command: Any) -> None:
        commands.append(command)
        started.set()
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(0)

    def measure(*arguments: Any) -> Any:
        if hangs:
            assert started.wait(20)
            raise SystemExit(0)
        return [replace(row, status="ok") for row in run.unmeasured(arguments[0], arguments[1], "failed")]

    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(cli.os, "execv", execv)
    monkeypatch.setattr(run, "CASE_SECONDS", 0.2)
    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run.Schedule, "_compile", lambda self, cases: {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(cli, "chosen", lambda *_: [Suite([replace(TINY, rank=1)], [RIGHT])])
    monkeypatch.setattr(cli, "clock_of", lambda device: SimpleNamespace(roof=lambda precisions: Roof(1e9, {})))
    monkeypatch.setattr(cli, "provenance", lambda commit: {"commit": commit})
    with pytest.raises(SystemExit):
        cli.main(["run", "conv", "--out", str(tmp_path), "--commit", "abc", "--budget", "50"])
    (command,) = commands
    assert command[1:7] == ["-m", "bench", "run", "conv", "--out", str(tmp_path)]
    assert command[-3:] == ["--commit", "abc", "--resume"]
    assert 40 < float(command[command.index("--budget") + 1]) <= 50
    (row,) = results.read(tmp_path / "results.csv", results.Row).rows
    assert (row.layer, row.status) == ("conv 2", "failed")


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in ((["run", "nope"], "suite 'nope': must be one of step"), (["compare", "a", "b"], "a")):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert text in error
    with pytest.raises(ValueError, match="needs a CUDA device"):
        cli.chosen(["conv"], CPU, smoke=False)
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="it lacks the columns batch"):
        results.read(tmp_path / "results.csv", results.Row)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (row,) = run.measure(TINY, [RIGHT], CPU)
    results.write(tmp_path / "results.csv", [row, row], {"device": "d"})
    assert results.read(tmp_path / "results.csv", results.Row) == results.Results([row, row], {"device": "d"})
    text = (tmp_path / "results.csv").read_text()
    for damaged, message in (
        (text.replace(f",{row.flops},", ",many,"), "results.csv:2: flops is 'many'; it must be a whole number$"),
        (text[: text.rindex(str(row.flops))], "3: flops is '"),
    ):
        (tmp_path / "results.csv").write_text(damaged)
        with pytest.raises(ValueError, match=message):
            results.read(tmp_path / "results.csv", results.Row)


def test_the_cpu_clock_measures_milliseconds() -> None:
    clock = Clock()
    times = clock.time({"slow": [lambda: time.sleep(0.02)], "fast": [lambda: None]}, "eager")
    assert 2e4 <= min(times["slow"].samples) < 2e5
    assert max(times["fast"].samples) < 1e4
    turns = []
    runs = {"a": [lambda: turns.append("a0"), lambda: turns.append("a1")], "b": [lambda: turns.append("b")]}
    clock.time(runs, "eager")
    assert [turn for turn in turns if turn != "b"][:3] == ["a0", "a1", "a0"]
    rounds = [turns[n : n + 2] for n in range(0, len(turns), 2)]
    assert all(turn.count("b") == 1 for turn in rounds)
    assert len({turn[0] == "b" for turn in rounds}) == 2  # each is first in some rounds


def test_roof_of_a_cpu_is_a_rate() -> None:
    roof = Clock().roof(["float32"])
    assert 1e8 < roof.bandwidth < 1e13
    assert 1e8 < roof.flops["float32"] < 1e14


def test_a_fresh_process_tells_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, so that what this one holds does not count."""
    headline = HEADLINE["cpu"]
    number = next(n for n, (case, _) in enumerate(headline) if case.layer == "conv 6-7")
    start = Worker.start
    monkeypatch.setattr(fresh, "HEADLINE", {"cpu": headline[number : number + 1]})
    monkeypatch.setattr(Worker, "start", lambda function, device, _, caches: start(function, device, number, caches))
    ((_, row),) = fresh.measured("cpu", math.inf)
    assert (row.layer, row.provider, row.status) == ("conv 6-7", headline[number][1].name, "ok")
    assert 0.5 * headline[number][0].bytes < row.host_bytes < 100 * headline[number][0].bytes
    assert 0 < row.first_call_s < 60
    assert row.gpu_bytes is row.peak_bytes is row.cold_call_s is None


def test_a_process_that_fails_says_why(capfd: Any) -> None:
    with Worker.start(fresh._report, "cpu", 10**6, {}) as worker:
        assert fresh._received(worker, math.inf) == ("failed", {})
        worker.process.join()
    assert "IndexError" in capfd.readouterr().err


def hangs(pipe: Any) -> None:
    time.sleep(600)


def test_a_process_that_hangs_is_out_of_time() -> None:
    with Worker.start(hangs) as worker:
        assert fresh._received(worker, time.monotonic()) == ("out of time", {})
    assert worker.process.exitcode == -signal.SIGKILL


def test_caches_are_those_of_the_process(tmp_path: Path) -> None:
    """Which have to be set before it compiles anything, not before it imports."""
    pytest.importorskip("triton")
    with Worker.start(tell_caches, {name: str(tmp_path / name) for name in fresh.CACHES}) as worker:
        assert worker.receive(time.monotonic() + 60) == [str(tmp_path / name) for name in fresh.CACHES]


def tell_caches(pipe: Any, caches: Any) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from triton import knobs

    assert knobs.cache.dir
    assert cache_dir()
    os.environ.update(caches)
    pipe.send([knobs.cache.dir, cache_dir()])


def test_out_of_time_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(fresh.measured("cpu", time.monotonic())) == []
    assert capsys.readouterr().out == f"dropped, out of budget: {len(HEADLINE['cpu'])} processes\n"


def test_costs_are_fields_of_a_row() -> None:
    costs = fresh.costs(TINY, RIGHT, CPU)
    assert set(costs) == {"first_call_s", "peak_bytes", "host_bytes", "used"}
    assert set(costs) - {"used"} <= {field.name for field in fields(results.Fresh)}
