"""What got slower, faster, larger or wrong between two results of one device, such as those of two commits.

Rows are matched by `Row.key`. With medians a (before) and b (after), one is slower or faster if `|b - a| > 0.05 a` and
`|b - a|` exceeds the larger p80 - p20 of both; it takes more or less memory if peak bytes differ by more than 5 % of
those before and by more than 64 KiB. A row that was right and now is not is always named.
"""

import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from bench.results import Results, Row, parse, read

TIME, MEMORY, MEMORY_BYTES = 0.05, 0.05, 64 * 1024
RIGHT = ("ok", "smoke")  # statuses of rows whose result was right
LINES = 40  # of the table


class Change(NamedTuple):
    """One row in which the results differ.

    Args:
        row: as it is after.
        verdict: "now REFUSED" or another status, "slower", "more memory", "faster", "less memory", "now ok".
        before, after: microseconds or bytes; None where a status changed.
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
        """After over before; infinite for what is wrong now, or held no memory before."""
        if self.before is None or self.after is None:
            return float("inf") if self.regression else 0.0
        return self.after / self.before if self.before else float("inf")


class Comparison(NamedTuple):
    """Changes, worst first, of `matched` rows; how many rows of which suite are only before or only after."""

    changes: list[Change]
    matched: int
    only_before: Counter[str]
    only_after: Counter[str]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regression]


def load(name: str, folder: str = "bench/results") -> Results:
    """Results by name: a folder, a results.csv, or `REVISION[:FOLDER]`, as they were committed; files go first.

    Args:
        name: FOLDER is one below `folder`; it may be left out where the revision has one only.
        folder: relative to the working directory, which is in the repository.

    Raises:
        ValueError: it is none of these, or the revision has no, or several, results of that name.
    """
    if Path(name).exists():
        return read(Path(name))
    revision, _, wanted = name.partition(":")
    try:
        commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
    except ValueError as error:
        raise ValueError(f"{name}: neither a folder, nor a results.csv, nor a revision of this repository") from error
    files = _git("ls-tree", "-r", "-z", "--name-only", commit, "--", f"{folder}/").split("\0")
    parents = {PurePosixPath(file).parent: file for file in files if PurePosixPath(file).name == "results.csv"}
    found = {str(parent.relative_to(PurePosixPath(folder))): file for parent, file in parents.items()}
    if wanted.rstrip("/") in found:
        return parse(_git("show", f"{commit}:./{found[wanted.rstrip('/')]}"), name)
    if len(found) == 1 and not wanted:
        return parse(_git("show", f"{commit}:./{next(iter(found.values()))}"), name)
    choice = ", ".join(f"{revision}:{known}" for known in sorted(found))
    raise ValueError(f"{name}: name one of {choice}" if choice else f"{name}: it has no results below {folder}")


def compare(before: Results, after: Results) -> Comparison:
    """Match rows and judge their differences.

    Raises:
        ValueError: devices or numbers of threads differ; no row is in both; a row is there twice.
    """
    for field in ("device", "threads"):
        sides = [results.provenance.get(field, "unknown") for results in (before, after)]
        if sides[0] != sides[1]:
            raise ValueError(
                f"{field}: {sides[0]} before, {sides[1]} after; only results of one machine are comparable"
            )
    old, new = _by_key(before, "before"), _by_key(after, "after")
    matched = [key for key in old if key in new]
    if not matched:
        raise ValueError(f"no row is in both results, of {len(old)} before and {len(new)} after")
    changes = [change for key in matched for change in _changes(old[key], new[key])]
    changes.sort(key=lambda change: (not change.regression, -change.factor if change.regression else change.factor))
    only = [Counter(row.suite for key, row in a.items() if key not in b) for a, b in ((old, new), (new, old))]
    return Comparison(changes, len(matched), *only)


def text(comparison: Comparison) -> str:
    """A table of the changes, worst first, and a line that sums up."""
    lines = [_line(change) for change in comparison.changes[:LINES]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if len(comparison.changes) > LINES:
        table.append(f"and {len(comparison.changes) - LINES} more")
    verdicts = Counter(change.verdict for change in comparison.changes)
    words = [f"{count} {verdict}" for verdict, count in verdicts.items()] or ["nothing changed"]
    for when, only in (("before", comparison.only_before), ("after", comparison.only_after)):
        if only:
            words.append(f"only {when}: {', '.join(f'{count} of {suite}' for suite, count in sorted(only.items()))}")
    return "\n".join((*table, f"{comparison.matched} rows compared: {'; '.join(words)}"))


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


def _by_key(results: Results, when: str) -> dict[tuple[object, ...], Row]:
    rows = {row.key: row for row in results.rows}
    if len(rows) < len(results.rows):
        twice = Counter(row.key for row in results.rows).most_common(1)[0][0]
        raise ValueError(f"{when}: two rows of one name: {', '.join(map(str, filter(None, twice)))}")
    return rows


def _line(change: Change) -> tuple[str, ...]:
    unit, scale = ("MB", 1e-6) if "memory" in change.verdict else ("us", 1.0)
    numbers = ("", "")
    if change.before is not None and change.after is not None:
        numbers = f"{change.before * scale:.5g} -> {change.after * scale:.5g} {unit}", f"{change.factor:.2f}x"
    return change.verdict, *numbers, ", ".join(str(word) for word in change.row.key if word)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"git {arguments[0]}: {error}") from error
    return done.stdout.decode()
