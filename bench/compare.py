"""Changes in speed, memory and correctness between two results of one device, such as those of two commits.

Rows are matched by `Row.key`. With medians a (before) and b (after), a row is slower or faster if `|b - a| > 0.05 a`
and `|b - a|` exceeds the larger p80 - p20 of both. It takes more or less memory if peak bytes differ by more than 5 %
of those before and by more than 64 KiB. A row that was right and is not any more is always listed.
"""

import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from bench import words
from bench.results import Results, Row, parse, read

TIME, MEMORY, MEMORY_BYTES = 0.05, 0.05, 64 * 1024
RIGHT = ("ok", "smoke")  # status of rows with a right result
LINES = 40  # maximum number of lines in the table


class Change(NamedTuple):
    """A row of the later results that differs: in microseconds, in bytes, or in its status.

    The verdict is "slower", "more memory", "faster", "less memory", "now ok", or "now" and another status.
    """

    row: Row
    verdict: str
    before: float | None = None
    after: float | None = None

    @property
    def regression(self) -> bool:
        return self.verdict not in ("faster", "less memory", "now ok")

    @property
    def factor(self) -> float:
        """After over before; infinite if the result is wrong now, or took no memory before."""
        if self.before is None or self.after is None:
            return float("inf") if self.regression else 0.0
        return self.after / self.before if self.before else float("inf")

    @property
    def cells(self) -> tuple[str, str, str, str]:
        unit = words.size if "memory" in self.verdict else words.microseconds
        values = "", ""
        if self.before is not None and self.after is not None:
            values = f"{unit(self.before)} -> {unit(self.after)}", f"{self.factor:.2f}x"
        return self.verdict, *values, ", ".join(str(word) for word in self.row.key if word)


class Comparison(NamedTuple):
    """Changes, worst first; number of matched rows; numbers by suite of rows that are only before or only after."""

    changes: list[Change]
    matched: int
    only_before: Counter[str]
    only_after: Counter[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regression]

    def __str__(self) -> str:
        """A table of the changes and a line with totals."""
        lines = [change.cells for change in self.changes[:LINES]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        if len(self.changes) > LINES:
            table.append(f"and {len(self.changes) - LINES} more")
        verdicts = Counter(change.verdict for change in self.changes)
        sums = [f"{count} {verdict}" for verdict, count in verdicts.items()] or ["nothing changed"]
        for when, only in (("before", self.only_before), ("after", self.only_after)):
            if only:
                sums.append(f"only {when}: {', '.join(f'{count} of {suite}' for suite, count in sorted(only.items()))}")
        return "\n".join((*table, f"{self.matched} rows compared: {'; '.join(sums)}"))


def load(name: str, folder: str = "bench/results") -> Results[Row]:
    """Results by name: a folder, a results.csv, or committed ones as `REVISION[:FOLDER]`; existing files win.

    FOLDER is a folder within `folder`, and may be omitted if the revision has only one. `folder` is relative to the
    working directory, which must be in the repository.

    Raises:
        ValueError: the name is none of these, or the revision has no or several results of that name.
    """
    path = Path(name)
    if path.exists():
        return read(path / "results.csv" if path.is_dir() else path, Row)
    revision, _, wanted = name.partition(":")
    try:
        commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
    except ValueError as error:
        raise ValueError(f"{name}: neither a folder, nor a results.csv, nor a revision of this repository") from error
    files = _git("ls-tree", "-r", "-z", "--name-only", commit, "--", f"{folder}/").split("\0")
    paths = [PurePosixPath(file) for file in files if PurePosixPath(file).name == "results.csv"]
    committed = {str(path.parent.relative_to(PurePosixPath(folder))): path for path in paths}
    choice = wanted.rstrip("/") or (next(iter(committed)) if len(committed) == 1 else "")
    if choice in committed:
        return parse(_git("show", f"{commit}:./{committed[choice]}"), name, Row)
    choices = ", ".join(f"{revision}:{folder}" for folder in sorted(committed))
    raise ValueError(f"{name}: name one of {choices}" if choices else f"{name}: has no results in {folder}")


def compare(before: Results[Row], after: Results[Row]) -> Comparison:
    """Match rows and find their changes.

    Raises:
        ValueError: devices or numbers of threads differ; no row is in both; a row occurs twice.
    """
    for field in ("device", "threads"):
        a, b = (results.provenance.get(field, "unknown") for results in (before, after))
        if a != b:
            raise ValueError(f"{field}: {a} before, {b} after; only results of one machine are comparable")
    old, new = _by_key(before, "before"), _by_key(after, "after")
    matched = [key for key in old if key in new]
    if not matched:
        raise ValueError(f"no row is in both results, of {len(old)} before and {len(new)} after")
    changes = [change for key in matched for change in _changes(old[key], new[key])]
    changes.sort(key=lambda change: (not change.regression, -change.factor if change.regression else change.factor))
    only = [Counter(row.suite for key, row in a.items() if key not in b) for a, b in ((old, new), (new, old))]
    return Comparison(changes, len(matched), *only)


def _changes(before: Row, after: Row) -> Iterable[Change]:
    if (before.status in RIGHT) != (after.status in RIGHT):
        yield Change(after, f"now {after.status}" if before.status in RIGHT else "now ok")
    if before.status != "ok" or after.status != "ok":
        return
    a, b = before.median_us, after.median_us
    if a is not None and b is not None and abs(b - a) > max(TIME * a, _spread(before), _spread(after)):
        yield Change(after, "slower" if b > a else "faster", a, b)
    a, b = before.peak_bytes, after.peak_bytes
    if a is not None and b is not None and abs(b - a) > max(MEMORY * a, MEMORY_BYTES):
        yield Change(after, "more memory" if b > a else "less memory", a, b)


def _spread(row: Row) -> float:
    return 0.0 if row.p20_us is None or row.p80_us is None else row.p80_us - row.p20_us


def _by_key(results: Results[Row], when: str) -> dict[tuple[object, ...], Row]:
    rows = {row.key: row for row in results.rows}
    if len(rows) < len(results.rows):
        twice = Counter(row.key for row in results.rows).most_common(1)[0][0]
        raise ValueError(f"{when}: two rows with the same name: {', '.join(map(str, filter(None, twice)))}")
    return rows


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"git {arguments[0]}: {error}") from error
    return done.stdout.decode()
