"""What `python -m qkernels.runtime` says of the machine: what Triton needs is named, with what to install."""

import os
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from qkernels.runtime import __main__ as environment
from qkernels.runtime.device import INTERPRETED


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is found."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)


def executable(path: Path) -> Any:
    path.touch(0o755)
    return path


def test_no_compiler(bare: Any) -> None:
    assert environment.report()["C compiler"].startswith("missing: no gcc or clang")
    assert "apt-get install gcc" in environment.compiler()


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_the_compilers_that_triton_takes(name: str, bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = executable(tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.compiler() == f"ok, {path}"


def test_named_compiler(bare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes that of CC, there or not."""
    executable(tmp_path / "gcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "mine"))
    assert environment.compiler().startswith(f"missing: CC={tmp_path / 'mine'} is not there")
    mine = executable(tmp_path / "mine")
    assert environment.compiler() == f"ok, {mine}"


def test_nobody_has_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is a mere number."""
    for name in ("HOME", "TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError("getpwuid(): uid not found")))
    monkeypatch.chdir(tmp_path)
    assert "triton" in environment.triton_cache()


def test_no_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    found = environment.report()["Python headers"]
    assert found.startswith(f"missing: no {tmp_path / 'Python.h'}")
    assert f"install python3.{sys.version_info.minor}-dev (apt-get)" in found
    (tmp_path / "Python.h").touch()
    assert environment.python_headers() == f"ok, {tmp_path}"


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, or under a home; it need not be there yet, and asking makes nothing."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "home"))
    assert environment.triton_cache() == f"ok, {tmp_path / 'home' / '.triton' / 'cache'}"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert environment.report()["Triton cache"] == f"ok, {tmp_path / 'cache'}"
    assert not list(tmp_path.iterdir())


def test_the_cache_is_where_triton_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert str(knobs.cache.dir) in environment.triton_cache()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs a folder that not even root may write to")
def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/kernels")
    found = environment.report()["Triton cache"]
    assert found.startswith("unusable: nothing can be written in /proc")
    assert "TRITON_CACHE_DIR" in found


def test_cache_that_cannot_be_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert environment.triton_cache().startswith(f"unusable: nothing can be executed in {tmp_path}")


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 lets the kernels run on a CPU")
def test_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert environment.main(["--check", "--json", str(tmp_path / "check.json")]) == environment.CANNOT_RUN
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("the kernels cannot run: ")
    assert ("TRITON_INTERPRET=1" in last) == environment.runtime.HAS_TRITON
    assert not list(tmp_path.iterdir())


def test_without_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert environment.main([]) == 0
    assert "C compiler" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        environment.main(["--json", "file"])
