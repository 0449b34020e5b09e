"""`python -m qkernels.runtime --check`: kernels that are broken on purpose are named, and the others go on."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.session import OPERATORS
from qkernels.ops import _launch
from qkernels.ops.hamilton_conv import launch
from qkernels.runtime import check
from qkernels.runtime.__main__ import ALL_RIGHT, CANNOT_RUN, NOT_ALL_RIGHT
from qkernels.runtime.__main__ import check as self_check
from qkernels.runtime.recording import record

# One of each operator, in different types.
SOME = (
    "conv, linear pack tf32",
    "conv, linear epilogue's gradient float32",
    "conv forward, shared, bf16",
    "conv pool, first, fp16",
    "conv dx, deep, tf32",
    "conv dw, odd, float32 q8",
    "linear forward fp16",
    "gram forward, triangles, float32",
    "gram backward, stored, bf16",
    "folded-rowwise backward, fp16",
)


@pytest.fixture(autouse=True)
def tiles() -> None:
    """The check has its own."""


@pytest.fixture(autouse=True)
def memory() -> None:
    """The kernels' own tests look at addresses."""


def run(path: Path, *names: Any) -> Any:
    """Exit code and verdicts."""
    assert set(names) <= set(check.checks(tiny=True))
    code = self_check(path, names.__contains__)
    found = json.loads(path.read_text())
    assert "Triton cache" in found["environment"]
    assert list(found["kernels"]) == [name for name in check.checks(tiny=True) if name in names]
    return code, found["kernels"]


def broken(monkeypatch: pytest.MonkeyPatch, kernel: Any, instead: Any) -> None:
    """`instead` of launching this kernel, given what launches it."""
    launched = _launch.run

    def run(function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        def launch() -> None:
            launched(function, *arguments, **named)

        instead(arguments[1], launch) if function.fn.__name__ == kernel else launch()

    monkeypatch.setattr(_launch, "run", run)


def test_right_kernels_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, verdicts = run(tmp_path / "new" / "check.json", *SOME)
    assert verdicts == dict.fromkeys(SOME, "right") | verdicts
    assert set(verdicts.values()) == {"right"}
    assert code == ALL_RIGHT
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"right  {name}" for name in verdicts]
    assert lines[-1].startswith(f"{len(SOME)} of {len(SOME)} kernels are right, checked in ")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["check.json"]


def test_verdicts_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "check.json").mkdir()
    assert self_check(tmp_path / "check.json", ["linear dx fp16"].__contains__) == CANNOT_RUN
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"the verdicts cannot be written to {tmp_path / 'check.json'}: Is a directory"
    assert [path.name for path in tmp_path.iterdir()] == ["check.json"]


@pytest.mark.slow
def test_all_kernels_are_right(tmp_path: Path) -> None:
    every = check.checks(tiny=True)
    assert run(tmp_path / "check.json", *every) == (ALL_RIGHT, dict.fromkeys(every, "right"))


@pytest.mark.parametrize("bit", [1, 15])
def test_a_wrong_sign(
    bit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "NEGATIVE", launch.NEGATIVE ^ (1 << bit))
    names = "conv forward, deep, fp16", "conv dx, deep, fp16"  # whose signs are others
    code, verdicts = run(tmp_path / "check.json", *names)
    assert code == NOT_ALL_RIGHT
    assert verdicts[names[0]].startswith("wrong: y has an error of ")
    assert verdicts[names[1]] == "right"
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("1 of 2 kernels are right")
    assert last.endswith(f"; not {names[0]}")


def test_a_kernel_that_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "_hamilton_conv_dw_kernel", lambda arguments, launch: None)
    _, verdicts = run(tmp_path / "check.json", "linear dw bf16", "linear dx bf16")
    assert "values of dw are not finite, or were not written; " in verdicts["linear dw bf16"]
    assert verdicts["linear dw bf16"].startswith("wrong: ")
    assert verdicts["linear dx bf16"] == "right"


def test_a_kernel_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: Any, launch: Any) -> None:
        raise _launch.KernelUnavailable("\nTriton 9 cannot build it\nfor some reason")

    broken(monkeypatch, "_gram_kernel", fails)
    names = "gram forward, stored, fp16", "gram backward, dual, fp16", "folded-rowwise forward, fp16"
    code, verdicts = run(tmp_path / "check.json", *names)
    assert code == NOT_ALL_RIGHT
    assert verdicts[names[0]] == "failed: KernelUnavailable: Triton 9 cannot build it"
    assert verdicts[names[1]] == verdicts[names[2]] == "right"
    assert f"failed {names[0]}: KernelUnavailable: " in capsys.readouterr().out


def test_other_bits_in_a_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def last_bit(arguments: Any, launch: Any) -> None:
        launch()
        runs.append(None)
        if len(runs) == 2:
            arguments["out_ptr"].view(torch.int16)[0, 0, 0, 0] ^= 1

    broken(monkeypatch, "_hamilton_gradient_kernel", last_bit)
    name = "conv, linear epilogue's gradient bf16"
    assert run(tmp_path / "check.json", name)[1][name] == "wrong: dy has other bits in 1 of 1 repeats"


def test_a_counter_that_is_not_left_as_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(arguments: Any, launch: Any) -> None:
        launch()
        arguments["ticket_ptr"] += 1

    broken(monkeypatch, "_hamilton_conv_kernel", counts)
    name = "conv forward, shared, fp16"
    assert run(tmp_path / "check.json", name)[1][name].startswith("wrong: ")


@pytest.mark.parametrize(("code", "what"), [(4, "pooled"), (0, "argmax")])
def test_a_wrong_argmax(code: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says that nothing is above 0; one that always is the first pixel."""

    def other(arguments: Any, launch: Any) -> None:
        launch()
        arguments["output"].argmax_ptr.fill_(code)

    broken(monkeypatch, "_hamilton_conv_kernel", other)
    name = "conv pool, first, float32"
    found = run(tmp_path / "check.json", name)[1][name]
    assert "values of argmax are wrong" in found


@pytest.mark.parametrize("tiny", [False, True])
def test_a_session_finds_the_operators_in_every_name(tiny: bool) -> None:
    """`bench.session` measures no suite whose kernels are not right."""
    for name in check.checks(tiny):
        assert name.startswith(OPERATORS)
    found = " ".join(check.checks(tiny))
    assert all(operator in found for operator in OPERATORS)


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.filterwarnings("ignore")
def test_sums_are_shared_and_not(arch: int) -> None:
    """In every direction and type, on every architecture."""
    splits = defaultdict(set)
    for name, draw in check.checks(tiny=False).items():
        if name.startswith("conv ") and name.split(",")[1] in (" deep", " shared"):
            with record(arch) as recording:
                draw(torch.device("cpu")).run()
            products = [one for one in recording.launches if hasattr(one.arguments.get("META"), "SPLIT")]
            splits[name.split()[1], name.split(", ")[2]].add(products[-1].arguments["META"].SPLIT)
    assert len(splits) == 4 * len(check.PRODUCTS)
    assert all(
        found == ({False} if direction == "pool," else {False, True}) for (direction, _), found in splits.items()
    )


def worker(pipe: Any, device: Any, repeats: Any) -> None:
    """In place of a process on a GPU."""
    if device == "cpu":
        raise RuntimeError("no device for this process")
    pipe.send(("", True))
    while name := pipe.recv():
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "hangs":
            time.sleep(1000)
        pipe.send(("failed: CUDA error", False) if name == "spoils" else ("right", True))


def test_a_process_that_breaks_ends_no_other_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_work", worker)
    monkeypatch.setattr(check, "KERNEL_SECONDS", 3.0)
    names = ["a", "dies", "b", "spoils", "hangs", *"cdef", "dies"]
    found = []
    left = check._check_in_processes(names, torch.device("cuda:0"), 2, lambda *verdict: found.append(verdict))
    assert left == []
    assert sorted(name for name, _ in found) == sorted(names)
    assert {verdict for name, verdict in found if name in "abcdef"} == {"right"}
    verdicts = dict(found)
    assert verdicts["dies"] == "failed: its process ended with code -9"
    assert verdicts["spoils"] == "failed: CUDA error"
    assert verdicts["hangs"] == "failed: no result after 3 s"


def test_what_a_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, every = torch.get_num_threads(), check.checks(tiny=True)
    monkeypatch.setattr(check, "checks", lambda tiny: every)
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=check._work, args=(theirs, "cpu", 2))
    thread.start()
    try:
        assert ours.recv() == ("", True)
        ours.send("linear dx fp16")
        assert ours.recv() == ("right", True)
        monkeypatch.setattr(check, "_is_sound", lambda device: False)
        ours.send("gram forward, triangles, fp16")
        assert ours.recv() == ("right", False)
    finally:
        ours.close()
        thread.join()
        torch.set_num_threads(threads)


def test_where_no_process_can_begin_all_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU for a single process, say."""
    monkeypatch.setattr(check, "_work", worker)
    found = []
    left = check._check_in_processes(["a", "b", "c"], torch.device("cpu"), 2, lambda *verdict: found.append(verdict))
    assert (left, found) == (["a", "b", "c"], [])
