"""Two of the same command at the same time: the second waits or is refused in one line, and the files are as of one."""

import dataclasses
import re
from pathlib import Path

import pytest

from qat.data.manifest import Manifest
from tests.trust.commands import Command, commands, sweep, timed


def twice(command: Command) -> list[tuple[int, str]]:
    """Exit codes and output of two at once."""
    both = [dataclasses.replace(command, number=number) for number in (1, 2)]
    processes = [one.start() for one in both]
    for process in processes:
        process.join()
    return [(process.exitcode, one.told()) for one, process in zip(both, processes, strict=True)]


@pytest.mark.parametrize("name", ["prepare", "report"])
def test_what_is_short_is_waited_for(name: str, corpus: Manifest, cache: Path, rhemo: Path, tmp_path: Path) -> None:
    command = commands(tmp_path, corpus.root / "tiny.csv", cache, rhemo)[name]
    timed(command)
    alone = command.left()
    command.clear()
    for code, told in twice(command):
        assert code == 0, told
    assert command.left() == alone


def test_of_two_trainings_one_is_told_who_holds_the_folder(
    corpus: Manifest, cache: Path, rhemo: Path, tmp_path: Path
) -> None:
    command = commands(tmp_path, corpus.root / "tiny.csv", cache, rhemo)["train"]
    timed(command)
    alone = command.left()
    command.clear()
    [trained, refused] = sorted(twice(command))
    assert trained[0] == 0, trained[1]
    assert refused[0] == 2, refused[1]
    holder = r"(process \d+ on \S+ \(since .*\)|a process that has not said which)"  # they begin in the same moment
    assert re.search(rf"^qat train: .*run: {holder} writes there; .* or wait$", refused[1], re.M)
    assert command.left() == alone


@pytest.mark.slow
def test_two_sweeps_share_the_runs(corpus: Manifest, cache: Path, tmp_path: Path) -> None:
    """One that finds the other at the last of them says so, and ends with 1."""
    command = sweep(tmp_path, corpus.root / "tiny.csv", cache)
    timed(command)
    alone = command.left()
    command.clear()
    for code, told in twice(command):
        assert code == 0 or (code == 1 and "is training it" in " ".join(told.split())), told
    assert command.run() == 0, command.told()
    assert command.left() == alone


@pytest.mark.slow
def test_two_makers_of_a_corpus(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    words = ("corpus", "make", "demo", "--folder", str(tmp_path / "make/demo"))
    command = Command(words, tmp_path / "make")
    told = twice(command)
    assert [code for code, _ in told] == [0, 0], told
    assert sum("waiting for " in text for _, text in told) == 1  # a process, or one that has not said which
    assert [path.name for path in (tmp_path / "make").iterdir() if not path.name.startswith(".demo.lock")] == ["demo"]
