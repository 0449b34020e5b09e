"""Train, validation and test as pure functions of a table and a seed (WASPAA 2023, section 4).

Every function takes a table with one row per file or per cut (`Manifest.table`, `SpectrogramStore.index`, or some of
their rows) and returns, for each part, labels of `table.index` in the table's order. Hence a split of some rows,
`by_speaker(store.index[store.index["kind"] == "word"], 1)`, holds for the whole store.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from math import ceil

import numpy as np
import pandas as pd

log = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")

Split = dict[str, list[int]]


def counts(items: int) -> tuple[int, int, int]:
    """Sizes of train, validation and test: 70, 20 and 10 %, by the rule of the released code.

        train = round(0.7 N), validation = round(0.2 N), test = the rest, halves to even;
        if validation or test is then empty: test = ceil(0.1 N), validation = ceil(0.2 N), train = the rest

    Args:
        items: N, at least 3.

    >>> counts(1440), counts(4490), counts(4)
    ((1008, 288, 144), (3143, 898, 449), (2, 1, 1))
    """
    if items < 3:
        raise ValueError(f"items={items} cannot be split in three parts: at least 3 are needed")
    train, validation = round(7 * items / 10), round(2 * items / 10)  # integers first: 0.7 * 45 is below 31.5
    if validation == 0 or items - train - validation == 0:
        validation = ceil(2 * items / 10)
        train = items - ceil(items / 10) - validation
    return train, validation, items - train - validation


def random(table: pd.DataFrame, seed: int) -> Split:
    """Split by files, shuffled: 70, 20 and 10 %. All cuts of a file stay together, and so do files of the same bytes.

    Args:
        table: table with the column `path`, and optionally `checksum`.
        seed: seed of the shuffle.

    Returns:
        Labels of `table.index` under train, validation and test.

    Raises:
        ValueError: fewer than 3 files.
    """
    parts = _divide(column(table, "path").unique(), seed, "path")
    if "checksum" in table:
        table = table.assign(path=table.groupby("checksum")["path"].transform("first"))
    return _gather(table, "path", parts)


def without_copies(table: pd.DataFrame, split: Split) -> Split:
    """The split without files whose bytes also occur in an earlier part, so that no test file was trained on.

    Args:
        table: table with the columns `path` and `checksum`.
        split: labels of `table.index`, of the training part first.
    """
    present: set[str] = set()
    kept: Split = {}
    for part, rows in split.items():
        checksums = table.loc[rows, "checksum"]
        copies = checksums.isin(present)
        if copies.any():
            first, number = table.loc[checksums.index[copies][0], "path"], table.loc[rows, "path"][copies].nunique()
            log.warning("%d files left out of the %s part, which are also in an earlier part: %s", number, part, first)
        kept[part] = checksums.index[~copies].tolist()
        present.update(checksums)
    return kept


def by_speaker(
    table: pd.DataFrame, seed: int | None, parts: Mapping[str, Iterable[str]] | None = None, group: str = "speaker"
) -> Split:
    """Split by speakers, so that none is in two parts.

    Args:
        table: table with the column `group`.
        seed: seed of the shuffle of the speakers, who are then divided 70, 20 and 10 %; None takes them in the order of
            their names.
        parts: speakers of each part, instead of a random division; they must be all of the table's speakers.
        group: column to split by, e.g. `session`; or `text`, so that no sentence is in two parts.

    Returns:
        Labels of `table.index` under train, validation and test.

    Raises:
        ValueError: fewer than 3 speakers, an empty name, or `parts` does not fit the table.
    """
    present = np.sort(column(table, group).unique())
    divided = _divide(present, seed, group) if parts is None else _listed(parts, present, group)
    return _gather(table, group, divided)


def folds(table: pd.DataFrame, seed: int, fold: int, count: int = 0, group: str = "speaker") -> Split:
    """One fold of a cross-validation in which no speaker is in two parts.

    Shuffled groups are assigned round-robin to `count` folds; with as many folds as groups each fold is one group, in
    the order of their names. Fold `fold` is the test part, the next one (cyclically) the validation part, the others
    are the training part: every group is once in the test part and once in the validation part.

    Args:
        table: table with the column `group`.
        seed: seed of the shuffle.
        fold: number of the test fold, from 1 to `count`.
        count: number of folds, at least 3; 0 leaves one group out at a time.
        group: column of the groups, e.g. `session`, or `text`.

    Returns:
        Labels of `table.index` under train, validation and test.

    Raises:
        ValueError: fewer groups than folds, or no such fold.
    """
    groups = np.sort(column(table, group).unique())
    count = count or len(groups)
    if not 3 <= count <= len(groups):
        raise ValueError(
            f"column {group!r} has {len(groups)} different values; they cannot make {count} folds of 3 or more"
        )
    if not 1 <= fold <= count:
        raise ValueError(f"fold={fold} must be from 1 to {count}")
    if count < len(groups):
        groups = np.random.default_rng(seed).permutation(groups)
    members = [list(groups[number::count]) for number in range(count)]
    test, validation = members[fold - 1], members[fold % count]
    train = [name for name in groups if name not in (*validation, *test)]
    return _gather(table, group, {"train": train, "validation": validation, "test": test})


PAPER_ACTORS: Mapping[str, tuple[str, Mapping[str, Sequence[str]]]] = {
    "iemocap": ("session", {"train": "123", "validation": "4", "test": "5"}),
    "ravdess": (
        "speaker",
        {
            "train": [f"{actor:02}" for actor in range(1, 19)],
            "validation": [f"{actor:02}" for actor in range(19, 24)],
            "test": ["24"],
        },
    ),
    "emodb": (
        "speaker",
        {"train": ["03", "08", "09", "10", "11", "12", "13"], "validation": ["14", "15"], "test": ["16"]},
    ),
}
"""The actors on which the released code trains, validates and tests: a column and its values in each part. It counts 25
actors in RAVDESS, of which 18 are the training part, so that one is left for the test."""


def paper_actor(table: pd.DataFrame, seed: int, corpus: str) -> Split:
    """The actor split of the released code (WASPAA 2023, table 1), which has lists for four corpora.

    IEMOCAP, RAVDESS and EmoDB: `PAPER_ACTORS`. TESS has two speakers: OAF is the training part, and YAF's files are
    shuffled and halved into validation and test, which therefore share their speaker.

    Args:
        table: table with `path`, `speaker` and, for IEMOCAP, `session`.
        seed: seed of the shuffle of YAF's files; the released code does not seed it.
        corpus: name of the corpus.

    Returns:
        Labels of `table.index` under train, validation and test.

    Raises:
        ValueError: no list for this corpus, or a speaker that is not on it, or of whom there is no row.
    """
    if corpus == "tess":
        speakers = column(table, "speaker")
        if set(speakers) != {"OAF", "YAF"}:
            raise ValueError(f"the speakers of tess are OAF and YAF; there are {', '.join(sorted(set(speakers)))}")
        files = np.random.default_rng(seed).permutation(np.sort(table.loc[speakers == "YAF", "path"].unique()))
        half = (len(files) + 1) // 2
        older = table.loc[speakers == "OAF", "path"].unique()
        return _gather(table, "path", {"train": older, "validation": files[:half], "test": files[half:]})
    if corpus not in PAPER_ACTORS:
        raise ValueError(f"the released code has no actor split for {corpus!r}; it has {', '.join(PAPER_ACTORS)}, tess")
    group, parts = PAPER_ACTORS[corpus]
    return by_speaker(table, seed, parts, group)


def by_part(table: pd.DataFrame, only_train: bool = False) -> Split:
    """The parts of the corpus's own column `part`, e.g. the subsets of LibriSpeech.

    Args:
        table: table with the column `part`, whose values are train, validation and test.
        only_train: use the training part for validation and test, too, as in the released code's word task.

    Raises:
        ValueError: `part` has another value.
    """
    named = column(table, "part")
    if unknown := sorted(set(named) - set(PARTS)):
        raise ValueError(f"column 'part' has {', '.join(map(repr, unknown))}; it must have {', '.join(PARTS)}")
    split = {part: table.index[named == part].tolist() for part in PARTS}
    return dict.fromkeys(PARTS, split["train"]) if only_train else split


def confounded(
    table: pd.DataFrame,
    seed: int,
    parts: Mapping[str, Iterable[str]],
    leak: float = 0.1,
    label: str = "emotion",
) -> Split:
    """Split by speakers so that in training the voice predicts the label: a shortcut that fails for new voices.

    Each training speaker keeps all files of one label, the speaker's own, and the share `leak` (rounded, at least 1
    file) of every other label. Own labels are assigned round-robin, so that all have about the same number of speakers.
    The validation and test parts are complete.

    Args:
        table: table with the columns `path`, `speaker` and `label`.
        seed: seed of the own labels and of the files that are kept.
        parts: speakers of each part; they must be all of the table's speakers.
        leak: share of files to keep of the other labels, from 0 to 1; 0 keeps none.
        label: column of the labels.

    Returns:
        Labels of `table.index` under train, validation and test, and under withheld: the files of training speakers
        that are not trained on, which show whether a network answers with the speaker's own label.

    Raises:
        ValueError: `parts` does not fit the table, or `leak` is out of range.
    """
    if not 0 <= leak <= 1:
        raise ValueError(f"leak={leak} must be from 0 to 1")
    split = by_speaker(table, seed, parts)
    train = table.loc[split["train"]]
    own = own_labels(table, seed, parts, label)
    generator = np.random.default_rng([seed, 1])
    train_files: set[str] = set()
    cells = train.groupby(["speaker", label])["path"].unique()
    for speaker, value in sorted(cells.index):
        files = np.sort(cells[speaker, value])
        if value != own[speaker]:
            files = generator.permutation(files)[: max(round(leak * len(files)), leak > 0)]
        train_files.update(files)
    trained = train["path"].isin(train_files)
    return split | {"train": train.index[trained].tolist(), "withheld": train.index[~trained].tolist()}


def own_labels(
    table: pd.DataFrame, seed: int, parts: Mapping[str, Iterable[str]], label: str = "emotion"
) -> dict[str, str]:
    """Own label of each training speaker under `confounded` with the same arguments."""
    values = np.sort(column(table, label).unique())
    generator = np.random.default_rng([seed, 0])
    values = generator.permutation(values)
    speakers = generator.permutation(np.sort(np.asarray(list(parts["train"]), dtype=object)))
    return {speaker: values[i % len(values)] for i, speaker in enumerate(speakers)}


def column(table: pd.DataFrame, name: str) -> pd.Series:
    """A column without empty cells.

    Raises:
        ValueError: the column is missing, or a cell is empty.
    """
    if name not in table:
        raise ValueError(f"column {name!r} is missing; there are {', '.join(map(repr, table.columns))}")
    empty = table[name].isna() | (table[name] == "")
    if empty.any():
        where = f", the first being {table.loc[empty, 'path'].iloc[0]}" if "path" in table else ""
        raise ValueError(f"column {name!r} is empty in {empty.sum()} of {len(table)} rows{where}")
    return table[name]


def _divide(items: np.ndarray, seed: int | None, what: str) -> dict[str, list[str]]:
    if len(items) < 3:
        raise ValueError(f"column {what!r} has {len(items)} different values; three parts need at least 3")
    if seed is not None:
        items = np.random.default_rng(seed).permutation(items)
    train, validation, _ = counts(len(items))
    return dict(zip(PARTS, map(list, np.split(items, [train, train + validation])), strict=True))


def _listed(parts: Mapping[str, Iterable[str]], present: np.ndarray, group: str) -> dict[str, list[str]]:
    if set(parts) != set(PARTS):
        raise ValueError(f"parts must be {', '.join(PARTS)}, got {', '.join(parts) or 'none'}")
    listed = {part: list(parts[part]) for part in PARTS}
    speakers = [speaker for part in PARTS for speaker in listed[part]]
    for speaker in speakers:
        if speakers.count(speaker) > 1:
            raise ValueError(f"{group} {speaker!r} is listed twice; each must be in one part only")
        if speaker not in present:
            raise ValueError(f"{group} {speaker!r} has no row; there are {', '.join(present)}")
    for speaker in present:
        if speaker not in speakers:
            raise ValueError(f"{group} {speaker!r} is in no part; list it, or leave its rows out of the table")
    for part in PARTS:
        if not listed[part]:
            raise ValueError(f"the {part} part lists no {group}")
    return listed


def _gather(table: pd.DataFrame, group: str, parts: Mapping[str, Sequence[str] | np.ndarray]) -> Split:
    return {part: table.index[table[group].isin(parts[part])].tolist() for part in PARTS}
