"""`kill -9` at random moments: the same command goes on to the same bytes, and nothing is left behind.

Most moments are after the first file, as nothing can be damaged before. `pytest -m slow tests/trust -s` prints what was
killed where.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qat.data.manifest import Manifest
from tests.trust.commands import Command, commands, grid, sweep, timed

FEW = {"train": 2, "pretrain": 1, "prepare": 1, "report": 1}
MANY = {"sweep": 10, "grid": 10, "train": 30, "pretrain": 20, "prepare": 10, "report": 20}


@pytest.fixture
def command(request: pytest.FixtureRequest, corpus: Manifest, cache: Path, tmp_path: Path) -> Command:
    """The command that the test is of; the recordings for `grid` take a while."""
    name, manifest = request.param, corpus.root / "tiny.csv"
    if name == "grid":
        return grid(tmp_path, request.getfixturevalue("small"))
    if name == "sweep":
        return sweep(tmp_path, manifest, cache)
    return commands(tmp_path, manifest, cache, request.getfixturevalue("rhemo"))[name]


@pytest.mark.parametrize(
    ("command", "kills"),
    [
        *FEW.items(),
        *(pytest.param(*item, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]) for item in MANY.items()),
    ],
    indirect=["command"],
)
def test_the_same_command_goes_on_to_the_same_bytes(command: Command, kills: int, rng: np.random.Generator) -> None:
    first, seconds = timed(command)
    whole = command.left()
    where: Counter[str] = Counter()
    while where.total() < kills:
        if state := command.killed_after(rng.uniform(0.8 * first, seconds)):
            where[state] += 1
            assert command.run() == 0, f"killed {state}: {command.told()}"
            assert command.left() == whole, f"killed {state}"
    print(f"\nqat {command.words[0]}, {seconds:.1f} s, killed {kills} times:")
    print(*(f"  {n:3} {state}" for state, n in where.most_common()), sep="\n")
