"""What the readers of published corpora share: finding recordings, and telling what is missing or does not belong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AUDIO = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".mp4"})
"""Endings, in lower case, of what may be a recording."""

Row = dict[str, Any]
Counts = Mapping[str, Mapping[str, int]]
"""Of each column, how many files each of its values has."""


@dataclass(frozen=True)
class Survey:
    """What a folder holds of a corpus.

    Args:
        rows: of the manifest, without `checksum`.
        missing: what should be there and is not: a path, or nothing where only a count is known, and what is wrong.
        unexpected: what is there and is not taken, in the same way.
    """

    rows: list[Row] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    unexpected: list[tuple[str, str]] = field(default_factory=list)

    def compare(self, found: Iterable[Mapping[str, str]], published: Counts) -> None:
        """Note where the files of a value are fewer or more than published.

        Args:
            found: one mapping per file, with the columns of `published`.
            published: the counts of the complete corpus.
        """
        found = list(found)
        for column, counts in published.items():
            here = Counter(row[column] for row in found if row[column])
            for value in sorted({*counts, *here}):
                if here[value] != counts.get(value, 0):
                    notes = self.missing if here[value] < counts.get(value, 0) else self.unexpected
                    notes.append(("", f"{column} {value}: {here[value]} files, published are {counts.get(value, 0)}"))


def files(folder: Path, endings: Iterable[str] = AUDIO) -> list[Path]:
    """Files below a folder that have one of these endings (in any case), in order; not the `._` files of macOS."""
    return sorted(
        file
        for file in Path(folder).rglob("*")
        if file.suffix.lower() in endings and not file.name.startswith("._") and file.is_file()
    )


def survey(
    folder: Path,
    parse: Callable[[Path], tuple[str, Row] | str],
    published: Counts,
    names: Callable[[list[Row]], Iterable[str]] = lambda rows: (),
    endings: Iterable[str] = AUDIO,
) -> Survey:
    """Survey a corpus whose file names tell everything.

    Args:
        folder: of the corpus.
        parse: gives, for a file, its name in the corpus and its row without `path`; or why it is none of the corpus.
        published: the counts of the complete corpus.
        names: gives, for the rows, the names that must be there, if they are known.
        endings: of the files to look at.
    """
    found = Survey()
    taken: dict[str, str] = {}
    for file in files(folder, endings):
        path, parsed = file.relative_to(folder).as_posix(), parse(file)
        if isinstance(parsed, str):
            found.unexpected.append((path, parsed))
        elif (name := parsed[0]) in taken:
            found.unexpected.append((path, f"{name} is there already: {taken[name]}"))
        else:
            taken[name] = path
            found.rows.append({"path": path, **parsed[1]})
    found.missing.extend((f"{name}.wav", "is not there") for name in names(found.rows) if name not in taken)
    found.compare(found.rows, published)
    return found
