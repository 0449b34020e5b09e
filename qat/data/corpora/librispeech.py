"""LibriSpeech with word alignments: single words by many readers, for the word task (Panayotov et al. 2015, CC BY 4.0).

A row is a word: a segment of an utterance's file; no segments are written to disk. The times of the words come from a
published set of forced alignments: the lists of SpeechVGG, or TextGrids.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qat.data.corpora import _published

SUBSETS = ("train-clean-100", "dev-clean", "test-clean")
"""Subsets that are read by default: the training, validation and test part."""

PUBLISHED = {
    "train-clean-100": 28539,
    "train-clean-360": 104014,
    "train-other-500": 148688,
    "dev-clean": 2703,
    "dev-other": 2864,
    "test-clean": 2620,
    "test-other": 2939,
}
"""Utterances of each subset."""

_PARTS = {"train": "train", "dev": "validation", "test": "test"}
_UTTERANCE = re.compile(r"(\d+)-\d+-\d+")
_SILENCE = frozenset({"", "sp", "sil", "<unk>", "<eps>"})
"""Labels of alignments for silence and unknown words."""


class Word(NamedTuple):
    """A word of an utterance, in lower case, with its time in seconds."""

    utterance: str
    start: float
    duration: float
    text: str


def survey(
    folder: Path,
    alignments: str | None = None,
    words: int = 1000,
    limit: int = 120_000,
    subsets: Sequence[str] = SUBSETS,
) -> _published.Survey:
    """Compare a folder with the published corpus.

    Args:
        folder: `LibriSpeech`, with `train-clean-100/103/1240/103-1240-0000.flac`, at any depth.
        alignments: folder of the alignments, if they are elsewhere: either one list per subset, such as
            `word_labels/train-clean-100-selected-1000.txt` (a line has utterance, channel, start, duration and word,
            separated by spaces), or TextGrids as `train-clean-100/103/1240/103-1240-0000.TextGrid` with a tier `words`.
            Lists take precedence. Reading 34,000 TextGrids takes a minute or two, each time.
        words: size of the vocabulary: the list `1000-mostfreq` beside the lists if there is one, else the most
            frequent words of the training part.
        limit: maximum number of words in each part; they are drawn at random with a fixed seed.
        subsets: subsets to read.

    Returns:
        The survey, with one row per word of the vocabulary: `text` is the word, in lower case, `start` and `duration`
        its time in the file, `speaker` the reader; further `part` (train, validation or test), `subset` and
        `utterance`. There are no emotions.

    Raises:
        ValueError: no recording, no alignment, an unknown option or subset, or a list or TextGrid that cannot be read.
    """
    if words < 1 or limit < 1:
        raise ValueError(f"librispeech: options words={words} and limit={limit} must be at least 1")
    if unknown := [subset for subset in subsets if subset not in PUBLISHED]:
        raise ValueError(f"librispeech: subset {', '.join(unknown)} is none of {', '.join(PUBLISHED)}")
    survey = _published.Survey()
    recordings: dict[str, dict[str, str]] = {subset: {} for subset in PUBLISHED}
    for file in _published.files(folder, {".flac"}):
        path, name, subset = file.relative_to(folder).as_posix(), file.stem, _subset(file)
        if subset not in PUBLISHED or not _UTTERANCE.fullmatch(name):
            survey.unexpected.append((path, "it is no utterance in the folder of a subset, as dev-clean/84/121123"))
        elif name in recordings[subset]:
            survey.unexpected.append((path, f"{name} is there already: {recordings[subset][name]}"))
        else:
            recordings[subset][name] = path
    recorded = [{"subset": subset} for subset in subsets for _ in recordings[subset]]
    survey.compare(recorded, {"subset": {subset: PUBLISHED[subset] for subset in subsets}})
    if not recorded:
        return survey
    place = Path(folder) if alignments is None else Path(alignments)
    files = _published.files(place, {".txt", ".ctm", ".textgrid"})
    rows: list[_published.Row] = []
    vocabulary: set[str] | None = None
    for subset in subsets:
        lists = [file for file in files if re.fullmatch(rf"{subset}(-selected-\d+)?\.(txt|ctm)", file.name)]
        if lists:
            list_file = min(lists, key=lambda file: (file.stem != f"{subset}-selected-{words}", file))
            spoken = list(_read_list(list_file))
            vocabulary = vocabulary or _vocabulary(list_file.with_name(f"{words}-mostfreq"))
            aligned = {word.utterance for word in spoken}
        else:
            grids = [file for file in files if file.suffix.lower() == ".textgrid" and _subset(file) == subset]
            spoken = [word for file in grids if file.stem in recordings[subset] for word in _read_grid(file)]
            aligned = {file.stem for file in grids}
        if recordings[subset] and not aligned:
            raise ValueError(
                f"{place}: no word alignments of {subset}: neither a list {subset}-selected-{words}.txt nor TextGrids "
                f"in a folder {subset}"
            )
        if recordings[subset]:
            absent = sorted(aligned - recordings[subset].keys())
            survey.missing.extend((f"{subset}/{name}.flac", "is aligned and not there") for name in absent)
            if count := len(recordings[subset].keys() - {word.utterance for word in spoken}):
                survey.unexpected.append(("", f"subset {subset}: {count} utterances have no aligned word"))
        for word in spoken:
            if word.utterance in recordings[subset]:
                rows.append(
                    {
                        "path": recordings[subset][word.utterance],
                        "speaker": word.utterance.partition("-")[0],
                        "text": word.text,
                        "emotion": "",
                        "start": word.start,
                        "duration": word.duration,
                        "part": _PARTS[subset.partition("-")[0]],
                        "subset": subset,
                        "utterance": word.utterance,
                    }
                )
    if vocabulary is None:
        training = [row for row in rows if row["part"] == "train"] or rows
        frequency = Counter(row["text"] for row in training)
        vocabulary = set(sorted(frequency, key=lambda text: (-frequency[text], text))[:words])
    survey.rows.extend(_at_most(limit, [row for row in rows if row["text"] in vocabulary]))
    return survey


def _subset(file: Path) -> str:
    return file.parents[2].name if len(file.parents) > 2 else ""


def _vocabulary(file: Path) -> set[str] | None:
    return {word.lower() for word in file.read_text(encoding="utf-8").split()} if file.is_file() else None


def _read_list(file: Path) -> Iterator[Word]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            utterance, _, start, duration, text = fields[:5]
            word = Word(utterance, float(start), float(duration), text.lower())
        except ValueError as error:
            raise ValueError(
                f"{file}: line {number}: {line!r} must be utterance, channel, start, duration and word"
            ) from error
        if word.text not in _SILENCE:
            yield word


def _read_grid(file: Path) -> Iterator[Word]:
    from praatio import textgrid  # imported here: only these alignments need it

    try:
        entries = textgrid.openTextgrid(str(file), includeEmptyIntervals=False).getTier("words").entries
    except Exception as error:  # whatever the parser stumbles over
        raise ValueError(f"{file}: no TextGrid with a tier 'words' ({error})") from error
    for start, end, text in entries:
        if text.lower() not in _SILENCE:
            yield Word(file.stem, start, round(end - start, 6), text.lower())


def _at_most(limit: int, rows: list[_published.Row]) -> Iterator[_published.Row]:
    """The rows of each part, of which at most `limit` are drawn at random."""
    for part in _PARTS.values():
        of_part = [row for row in rows if row["part"] == part]
        if len(of_part) > limit:
            numbers = np.random.default_rng(1).choice(len(of_part), limit, replace=False)
            of_part = [of_part[number] for number in np.sort(numbers)]
        yield from of_part
