"""Shared by the readers of published corpora: the comparison of a folder's files with those of the publication."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AUDIO = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".mp4"})
"""File name extensions of recordings, in lower case."""

Row = dict[str, Any]
Counts = Mapping[str, Mapping[str, int]]
"""Number of files by column and value."""


@dataclass(frozen=True)
class Survey:
    """The files of a corpus in a folder, compared with those that are published.

    Args:
        rows: rows of the manifest, without `checksum`.
        missing: path (empty if only a count is known) and description of each missing file.
        unexpected: path and description of each file that is not used.
    """

    rows: list[Row] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    unexpected: list[tuple[str, str]] = field(default_factory=list)

    def compare(self, rows: Iterable[Mapping[str, str]], published: Counts) -> None:
        """Record each value that has fewer or more files than published.

        Args:
            rows: one mapping per file, with the columns of `published`.
            published: counts of the complete corpus.
        """
        rows = list(rows)
        for column, counts in published.items():
            present = Counter(row[column] for row in rows if row[column])
            for value in sorted({*counts, *present}):
                files, expected = present[value], counts.get(value, 0)
                if files != expected:
                    notes = self.missing if files < expected else self.unexpected
                    notes.append(("", f"{column} {value}: {files} files, published are {expected}"))


def files(folder: Path, endings: Iterable[str] = AUDIO) -> list[Path]:
    """Files below a folder with one of these endings (in any case), sorted, without the `._` files of macOS.

    Links to folders are followed, but not back into a folder that they lie in.
    """
    return sorted(
        file
        for file in _below(Path(folder))
        if file.suffix.lower() in endings and not file.name.startswith("._") and file.is_file()
    )


def _below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    about = folder.stat()
    identity = (about.st_dev, about.st_ino)
    for path in folder.iterdir() if identity not in above else ():
        if path.is_dir():
            yield from _below(path, (*above, identity))
        else:
            yield path


def survey(
    folder: Path,
    parse: Callable[[Path], tuple[str, Row] | str],
    published: Counts,
    names: Callable[[list[Row]], Iterable[str]] = lambda rows: (),
    endings: Iterable[str] = AUDIO,
) -> Survey:
    """Survey of a corpus whose file names hold all labels.

    Args:
        folder: folder of the corpus.
        parse: function of a file: its name in the corpus and its row without `path`, or the reason why it is not in the
            corpus.
        published: counts of the complete corpus.
        names: function of the rows: names of all files of the complete corpus, if they are known.
        endings: endings of the files to compare.
    """
    survey = Survey()
    paths: dict[str, str] = {}
    for file in files(folder, endings):
        path, parsed = file.relative_to(folder).as_posix(), parse(file)
        if isinstance(parsed, str):
            survey.unexpected.append((path, parsed))
        elif (name := parsed[0]) in paths:
            survey.unexpected.append((path, f"{name} is there already: {paths[name]}"))
        else:
            paths[name] = path
            survey.rows.append({"path": path, **parsed[1]})
    survey.missing.extend((f"{name}.wav", "is not there") for name in names(survey.rows) if name not in paths)
    survey.compare(survey.rows, published)
    return survey
