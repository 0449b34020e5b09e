"""`qat doctor`: what is missing is named, and on a GPU what is not right."""

import json
from typing import Any

import pytest
import torch

from qat.cli import main
from qkernels.runtime import __main__ as environment

KERNELS = "kernels (python -m qkernels.runtime --check)"


def doctor(capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_triton_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("qat.doctor._kernels", lambda: "not asked here")
    report = doctor(capsys)
    assert "apt-get install gcc" in report["C compiler"]
    assert report["Python headers"]
    assert report["Triton cache"]
    assert (KERNELS in report) == torch.cuda.is_available()


def test_kernels_where_there_is_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check = pytest.importorskip("qkernels.runtime.check")
    real = environment.report
    monkeypatch.setattr(environment, "report", lambda: real() | {"gpus": "One"})
    monkeypatch.setattr(environment, "obstacle", lambda: None)

    def run(say: Any) -> Any:
        say("wrong  conv dx: by far")
        return {"conv dx": "wrong: by far", "gram": "right"}

    monkeypatch.setattr(check, "run", run)
    assert doctor(capsys)[KERNELS] == "1 of 2 kernels are right, checked in 0 s; not conv dx"
    monkeypatch.setattr(environment, "obstacle", lambda: "it is too old")
    assert doctor(capsys)[KERNELS] == "cannot run: it is too old"
