"""A disk that is full in the middle: one line and exit code 2, nothing damaged, and afterwards the same bytes.

The size of a file is limited instead; writing then fails with EFBIG as it does with ENOSPC.
"""

import dataclasses
import resource
from pathlib import Path

import numpy as np
import pytest

from qat.data.manifest import Manifest
from tests.trust.commands import commands, timed

FEW = {"train": 1, "report": 1}
MANY = {"train": 4, "pretrain": 2, "prepare": 2, "report": 2}


@pytest.mark.parametrize(
    ("name", "times"),
    [
        *FEW.items(),
        *(pytest.param(*item, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]) for item in MANY.items()),
    ],
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    name: str, times: int, corpus: Manifest, cache: Path, rhemo: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    command = commands(tmp_path, corpus.root / "tiny.csv", cache, rhemo)[name]
    timed(command)
    whole = command.left()
    largest = max(path.stat().st_size for path in command.folder.rglob("*"))
    for size in np.exp(rng.uniform(np.log(200), np.log(largest - 1), times)).astype(int).tolist():
        command.clear()
        assert dataclasses.replace(command, limits={resource.RLIMIT_FSIZE: size}).run() == 2, size
        last = command.told().rstrip("\n").rpartition("\n")[2]
        assert last.startswith(f"qat {command.words[0]}"), f"{size} bytes: {command.told()}"
        assert str(command.folder) in last
        assert "make room there, then the same command" in last
        assert "Traceback" not in command.told()
        assert command.run() == 0, f"after {size} bytes: {command.told()}"
        assert command.left() == whole, f"after {size} bytes"
