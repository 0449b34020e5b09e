"""A corpus as a table: one row per audio file, read from and written to CSV."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from csv import Error as CsvError
from csv import reader
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from qat.data.audio import AudioError, duration_of, load_audio
from qat.files import sha256_of, write_text
from qat.processes import bar

REQUIRED = ("path", "speaker", "text", "emotion")
"""Columns that a CSV must have; `duration` and `checksum` are computed when it lacks them."""

NUMBERS = ("start", "duration", "valence", "arousal", "dominance", "cut", "frames")
"""Columns of numbers; the others hold strings."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """A corpus: a folder, and a table with one row per audio file or, with the column `start`, per segment of one.

    Columns: `path` (relative to `root`, with slashes), `speaker`, `text`, `emotion` (empty where unknown), `duration`
    (seconds), `checksum` (SHA-256 of the file, hex), and further columns of the corpus, e.g. `words` (the spoken words,
    lower-case, separated by spaces), `part` (train, validation or test), `valence`, `arousal`, `dominance`. With
    `start` (seconds) a row is a segment of its file, from there for `duration`; no segments are written to disk.

    Args:
        root: folder that the paths are relative to.
        table: rows, numbered from 0.
        name: name of the corpus, for messages and folder names.

    Raises:
        ValueError: a column is missing, or a value breaks its rule; names the row (from 1, without the header).
    """

    root: Path
    table: pd.DataFrame
    name: str

    def __post_init__(self) -> None:
        _validate(self.table, self.name)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the name and all cells, which include the files' checksums; independent of `root`."""
        columns = sorted(self.table.columns)
        content = json.dumps([self.name, columns], ensure_ascii=False) + _to_csv(self.table[columns])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def segments(self) -> list[tuple[float, ...]]:
        """Segment of each row: start and duration in seconds, or `()` for the whole file."""
        if "start" not in self.table:
            return [()] * len(self)
        return list(zip(self.table["start"], self.table["duration"], strict=True))

    def by_file(self) -> list[list[int]]:
        """Row numbers in order, grouped so that a file with adjacent segments is read once."""
        files = list(zip(self.table["path"], self.table["checksum"], strict=True))
        return [list(rows) for _, rows in groupby(range(len(self)), key=files.__getitem__)]

    def filter(self, rows: str | Sequence[bool] | pd.Series) -> "Manifest":
        """The corpus with some of its rows, numbered from 0 again.

        Args:
            rows: `DataFrame.query` expression, e.g. `"kind == 'word'"`, or one bool per row.

        Raises:
            ValueError: no row is left.
        """
        table = self.table.query(rows) if isinstance(rows, str) else self.table[np.asarray(rows, dtype=bool)]
        if not len(table):
            raise ValueError(f"{self.name}: no row is left by the filter {rows if isinstance(rows, str) else 'mask'!r}")
        return Manifest(self.root, table.reset_index(drop=True), self.name)


def build_manifest(root: Path, rows: Iterable[Mapping[str, Any]], name: str) -> Manifest:
    """A manifest from rows without `duration` and `checksum`, which are computed from the files.

    Args:
        root: folder of the corpus.
        rows: one mapping per file with at least `path`, `speaker`, `text` and `emotion`; with `start` also `duration`.
        name: name of the corpus.

    Returns:
        The manifest, in the order of the rows. A file that is not audio gets duration 0; `prepare` reports it.

    Raises:
        ValueError: no rows, a file that does not exist, or a value that breaks its rule.
    """
    table = pd.DataFrame(list(rows))
    if not len(table):
        raise ValueError(f"{root}: no audio file of the corpus {name!r} in this folder")
    return Manifest(root, _complete(table, root, name), name)


def read_manifest(csv: Path, root: Path | None = None, name: str | None = None) -> Manifest:
    """Read a corpus from CSV.

    Args:
        csv: CSV file with a header and at least the columns `path`, `speaker`, `text` and `emotion`. Missing columns
            `duration` and `checksum` are computed from the files; with `start`, `duration` must not be missing. Spaces
            around a value do not count.
        root: folder that the paths are relative to; by default that of the CSV.
        name: name of the corpus; by default the CSV's without its ending, or its folder's for `manifest.csv`.

    Raises:
        ValueError: names file, row, column and rule.
    """
    csv = Path(csv)
    root = csv.parent if root is None else Path(root)
    if not csv.is_file():
        raise ValueError(f"{csv}: no such manifest")
    table = read_table(csv)
    if name is None:
        name = csv.resolve().parent.name if csv.stem == "manifest" else csv.stem
    for column in table.columns.difference([*NUMBERS]):
        table[column] = table[column].str.strip()
    if "path" in table:  # ./a.wav is a.wav
        table["path"] = [str(PurePosixPath(path)) if path else path for path in table["path"]]
    _validate(table, csv, complete=False)
    return Manifest(root, _complete(table, root, csv), name)


def write_manifest(manifest: Manifest, csv: Path) -> None:
    """Write a manifest as CSV, atomically. Paths stay relative to `manifest.root`."""
    write_table(manifest.table, Path(csv))


def read_table(csv: Path) -> pd.DataFrame:
    """Read a CSV; columns hold strings (never NaN), except those of `NUMBERS`.

    Raises:
        ValueError: not a CSV file, a row with another number of cells than the header, a column twice, a zero byte, or
            a cell of `NUMBERS` that is no finite number; names file and row.
    """
    try:
        with csv.open(encoding="utf-8-sig", newline="") as file:  # Excel writes a mark before the header
            rows = [row for row in reader(file, strict=True) if row]
    except (OSError, ValueError, CsvError) as error:
        raise ValueError(f"{csv}: not a CSV table ({error})") from None
    if not rows:
        raise ValueError(f"{csv}: not a CSV table (it is empty)")
    header = rows.pop(0)
    if twice := [name for n, name in enumerate(header) if name in header[:n]]:
        raise ValueError(f"{csv}: has the column {twice[0]!r} twice")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ValueError(f"{csv}: row {number} has {len(row)} cells; it must have {len(header)}, as the header has")
        if any("\0" in cell for cell in row):
            raise ValueError(f"{csv}: row {number} has a zero byte, which no text has")
    table = pd.DataFrame(rows, columns=header, dtype=str)
    for column in NUMBERS:
        if column in table:
            numbers = pd.to_numeric(table[column].replace("", np.nan), errors="coerce")
            _refuse(csv, table[column], ~np.isfinite(numbers) & (table[column] != ""), "must be a number")
            table[column] = numbers
    return table


def write_table(table: pd.DataFrame, csv: Path) -> None:
    """Write a table as CSV, atomically."""
    write_text(csv, _to_csv(table))


def check_files(manifest: Manifest, progress: bool = True) -> pd.DataFrame:
    """Compare every file or segment of a corpus with its manifest.

    Args:
        manifest: corpus.
        progress: show a progress bar.

    Returns:
        One row per unusable file or segment: `path` and `problem` (missing, changed, undecodable, silent, too short).
    """
    problems: list[tuple[str, str]] = []
    paths, checksums = manifest.table["path"].tolist(), manifest.table["checksum"].tolist()
    segments = manifest.segments
    with bar(progress) as progress_bar:
        task = progress_bar.add_task(f"Check {manifest.name}", total=len(manifest))
        for rows in manifest.by_file():
            path, usable = paths[rows[0]], False
            for row in rows:
                try:
                    load_audio(manifest.root / path, 16000, *segments[row])
                    usable = True
                except AudioError as error:
                    problems.append((path, str(error)))
            if usable and sha256_of(manifest.root / path) != checksums[rows[0]]:
                problems.append((path, "changed since the manifest was made: its checksum differs"))
            progress_bar.advance(task, len(rows))
    return pd.DataFrame(problems, columns=["path", "problem"])


def _complete(table: pd.DataFrame, root: Path, source: object) -> pd.DataFrame:
    """The table with `duration` and `checksum`, computed from the files if missing."""
    paths = table["path"]
    files = {path: root / path for path in paths.unique()}
    exists = {path: os.path.isfile(file) for path, file in files.items()}  # False for names that no file can have
    _refuse(source, paths, [not exists[path] for path in paths], f"is no file under {root}")
    with ThreadPoolExecutor() as pool:  # both functions wait for the disk and compute without Python's global lock
        for column, function in (("duration", duration_of), ("checksum", sha256_of)):
            if column not in table:
                values = dict(zip(files, pool.map(function, files.values()), strict=True))
                table = table.assign(**{column: paths.map(values)})
    return table


def _to_csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, lineterminator="\n")


def _validate(table: pd.DataFrame, source: object, complete: bool = True) -> None:
    for column in REQUIRED + ("duration", "checksum") * complete:
        if column not in table:
            raise ValueError(f"{source}: column {column!r} is missing; there are {', '.join(map(repr, table.columns))}")
    if not len(table):
        raise ValueError(f"{source}: has no rows")
    paths = table["path"]
    _refuse(source, paths, paths == "", "must not be empty")
    if "start" in table:
        if "duration" not in table:
            raise ValueError(f"{source}: column 'duration' is missing; beside 'start' it says how long a segment is")
        starts = table["start"].astype(float)
        _refuse(source, starts, ~(np.isfinite(starts) & (starts >= 0)), "must be a number of seconds from 0")
        _refuse(source, paths, table.duplicated(["path", "start"]), "must be in one row only for each 'start'")
    else:
        _refuse(source, paths, paths.duplicated(), "must be in one row only")
    inside = [not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts for path in paths]
    _refuse(source, paths, [not ok for ok in inside], "must be relative to the corpus folder and stay in it")
    if "duration" in table:
        seconds = table["duration"].astype(float)
        _refuse(source, seconds, ~(np.isfinite(seconds) & (seconds >= 0)), "must be a number of seconds from 0")
    if "checksum" in table:
        wrong = [re.fullmatch("[0-9a-f]{64}", checksum) is None for checksum in table["checksum"]]
        _refuse(source, table["checksum"], wrong, "must be 64 lower-case hexadecimal digits")


def _refuse(source: object, column: pd.Series, bad: Iterable[bool], rule: str) -> None:
    wrong = np.flatnonzero(np.asarray(list(bad), dtype=bool))
    if len(wrong):
        more = f" ({len(wrong) - 1} more such rows)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{source}: row {wrong[0] + 1}, column {column.name!r}: {column.tolist()[wrong[0]]!r} {rule}{more}"
        )
