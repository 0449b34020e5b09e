import errno
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import filelock
import pytest

import qat
from qat.files import (
    LARGEST,
    LOCK,
    Busy,
    held,
    holder,
    lock_of,
    make_once,
    read_json,
    read_yaml,
    replacing,
    write_json,
    write_text,
)


def hold(lock: Path) -> subprocess.Popen[str]:
    """Another process that holds ``lock`` until it is killed."""
    code = f"""
import pathlib, time
from qat.files import held
with held(pathlib.Path({str(lock)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(qat.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_says_who_holds_it_and_ends_with_that_process(tmp_path: Path) -> None:
    lock = tmp_path / "run/.lock"
    other = hold(lock)
    with pytest.raises(Busy, match=rf"^process {other.pid} on \S+ \(since \d{{4}}-\d\d-\d\dT\S+\)$"), held(lock):
        pass
    # Whoever was refused leaves the note of the holder as it was.
    assert holder(lock).startswith(f"process {other.pid} on ")
    other.kill()
    other.wait()
    with held(lock):
        assert holder(lock).startswith(f"process {os.getpid()} on ")


def test_threads_exclude_each_other_and_one_that_waits_says_so_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock, order = tmp_path / ".lock", []

    def wait() -> None:
        with held(lock, wait=True):
            order.append("waited")

    with held(lock):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        order.append("held")
    thread.join(30)
    assert order == ["held", "waited"]
    assert f"{lock}: waiting for process {os.getpid()} on" in caplog.text


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path / ".lock"):
        raise ZeroDivisionError
    with held(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    number: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, os.strerror(number))))
    message = f"{tmp_path}/.lock: cannot be locked ([Errno {number}] {os.strerror(number)}); use a folder on a file sys"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"), held(tmp_path / ".lock"):
        pass
    # What is only made once may as well be made twice.
    make_once(tmp_path / "made", lambda folder: (folder / "a").write_text("a"))
    assert (tmp_path / "made/a").is_file()
    assert "other processes may repeat this work" in caplog.text


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_without_flock_the_lock_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre without its mount option."""
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))))
    for _ in range(2):
        with held(tmp_path / ".lock"), pytest.raises(Busy, match=f"process {os.getpid()}"):
            thread_holds(tmp_path / ".lock")


def test_holders_that_left_no_note(tmp_path: Path) -> None:
    refused = pytest.raises(Busy, match="has not said which")
    with filelock.FileLock(tmp_path / ".lock"), refused, held(tmp_path / ".lock"):
        pass


def drafts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".part"))


def left(folder: Path, *names: str) -> None:
    """Drafts of writers that were killed, one of them with our number, as in a container where most are 1."""
    for name in names:
        for writer in (f"{os.getpid()}-0a1b2c3d", "4194304-ffffffff", "7"):
            (folder / f".{name}.{writer}.part").write_text("half")


def test_who_holds_the_lock_removes_what_killed_writers_of_the_same_file_left(tmp_path: Path) -> None:
    left(tmp_path, "a", "a.1", "b.a")
    others = [name for name in drafts(tmp_path) if not name.startswith((".a.7", f".a.{os.getpid()}", ".a.41"))]
    write_text(tmp_path / "a", "unlocked: whether they live could not be told")
    with held(tmp_path / "other" / LOCK):
        write_text(tmp_path / "a", "another folder's lock")
    assert len(drafts(tmp_path)) == 9
    with held(tmp_path / LOCK):
        write_text(tmp_path / "a", "whole")
        assert drafts(tmp_path) == others
        write_text(tmp_path / "below/b", "whole")
    assert (tmp_path / "a").read_text() == "whole"


def test_a_folder_that_is_made_once_replaces_the_drafts_of_killed_writers(tmp_path: Path) -> None:
    for name in ("store", "store.2"):
        (tmp_path / f".{name}.9.part").mkdir()
        (tmp_path / f".{name}.9.part/half").write_text("")
    left(tmp_path, "store")
    make_once(tmp_path / "store", lambda folder: (folder / "whole").write_text(""))
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["whole"]
    assert drafts(tmp_path) == [".store.2.9.part"]


def test_writers_of_one_file_at_once_have_drafts_of_their_own(tmp_path: Path) -> None:
    """Also two of one process, or of two containers, in which both are process 1."""
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"
    assert drafts(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(number: int, tmp_path: Path) -> None:
    """As Python's own errors of writing name no file."""

    def fill(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=rf"\[Errno {number}\] .*: '{tmp_path}/store'$"):
        make_once(tmp_path / "store", fill)
    write_text(tmp_path / "a", "before")
    with pytest.raises(OSError, match=rf"\[Errno {number}\] .*: '{tmp_path}/a'$"), replacing(tmp_path / "a") as draft:
        fill(draft.parent)
    assert (tmp_path / "a").read_text() == "before"
    assert drafts(tmp_path) == []
    assert not (tmp_path / "store").exists()


def test_a_folder_that_cannot_be_written_to_is_not_said_to_lack_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.open", Mock(side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))))
    for wait in (True, False):
        with pytest.raises(OSError, match="Read-only file system"), held(tmp_path / LOCK, wait=wait):
            pass


def test_whoever_needs_what_is_being_made_waits_and_takes_it(tmp_path: Path) -> None:
    """Processes that begin at the same time."""
    code = f"""
import pathlib, sys, time
from qat.files import make_once
print("ready", flush=True)
sys.stdin.readline()

def make(folder):
    (folder / "by").write_text(sys.argv[1])
    time.sleep(0.3)
    print("made", flush=True)

make_once(pathlib.Path({str(tmp_path / "made")!r}), make)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(qat.__file__).parents[1])}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(n)], text=True, env=environment, **pipes) for n in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    maker = int((tmp_path / "made/by").read_text())
    assert [out for out, _ in told] == ["made\n" if n == maker else "" for n in range(3)]
    waiting = f"{lock_of(tmp_path / 'made')}: waiting for "
    assert all(n == maker or err.startswith(waiting) for n, (_, err) in enumerate(told))


def test_json_is_always_json(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"loss": float("nan"), "parts": [1.5, float("-inf")], "name": "NaN"})
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == {
        "loss": None, "parts": [1.5, None], "name": "NaN"
    }  # fmt: skip
    file.write_text('{"loss": NaN, "best": Infinity}')  # of an earlier version
    assert read_json(file, "loss") == {"loss": None, "best": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON: Expecting value"),
        (b"{", "not readable as JSON"),
        (b"[]", "must hold a JSON object, not list"),
        (b"null", "must hold a JSON object, not NoneType"),
        (b"{}", "'experiment', 'kind' is missing"),
        (b"\xff\xfe", "not readable as JSON: 'utf-8' codec"),
        (b"[" * 100_000, "not readable as JSON"),
        (b" " * (LARGEST + 1), "not readable as JSON: larger than 16 MiB"),
    ],
)
def test_broken_json_is_one_line_with_the_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"result\.json: {message}") as raised:
        read_json(tmp_path / "result.json", "experiment", "kind")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [b", "while parsing"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor for the tag"),
        ("a: 1\nb: 2\na: 3\n", "'a' twice, from line 1"),
        ("[" * 1000, "more than 20 aliases or 40 levels"),
        ("a: &a [x, x]\n" + "".join(f"b{i}: [*a, *a, *a, *a]\n" for i in range(9)), "more than 20 aliases"),
        ("a: \0", "special characters are not allowed"),
        ("- 2026-13-45", "month must be in 1..12"),
    ],
)
def test_broken_yaml_is_one_line_with_the_file(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"my\.yaml: not readable as YAML: .*{message}") as raised:
        read_yaml(tmp_path / "my.yaml")
    assert "\n" not in str(raised.value)


def test_plain_yaml_is_read(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("a: &a {b: [1, 2.5]}\nc: *a\nd: [x, null, true]\n")
    assert read_yaml(tmp_path / "my.yaml") == {"a": {"b": [1, 2.5]}, "c": {"b": [1, 2.5]}, "d": ["x", None, True]}


def test_a_lock_may_be_asked_for_again_within_its_block(tmp_path: Path) -> None:
    """As by a training that a campaign's job has locked."""
    lock = tmp_path / ".lock"
    with held(lock):
        with held(tmp_path / "." / ".lock", nested=True), pytest.raises(Busy):
            thread_holds(lock)
        with pytest.raises(Busy), held(lock):
            pass
    thread_holds(lock)


def thread_holds(lock: Path) -> None:
    """Hold the lock for a moment in another thread, and raise what that raises."""

    def hold() -> None:
        with held(lock):
            pass

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold).result()
