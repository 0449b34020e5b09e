"""EmoDB, the Berlin database: ten German actors say ten sentences with seven emotions (Burkhardt et al. 2005)."""

from __future__ import annotations

import re
from pathlib import Path

from qat.data.corpora import _published

EMOTIONS = {
    "W": "angry",
    "L": "bored",
    "E": "disgust",
    "A": "fear",
    "F": "happy",
    "T": "sad",
    "N": "neutral",
}
"""By the German word: Wut, Langeweile, Ekel, Angst, Freude, Trauer."""

SEX = dict.fromkeys(("03", "10", "11", "12", "15"), "male") | dict.fromkeys(("08", "09", "13", "14", "16"), "female")

PUBLISHED = {
    "emotion": {"angry": 127, "bored": 81, "disgust": 46, "fear": 69, "happy": 71, "sad": 62, "neutral": 79},
    "speaker": {
        "03": 49,
        "08": 58,
        "09": 43,
        "10": 38,
        "11": 55,
        "12": 35,
        "13": 61,
        "14": 69,
        "15": 56,
        "16": 71,
    },
}
"""535 files: those that listeners recognised, so that no grid of names is complete."""

_NAME = re.compile(r"(\d\d)([ab]\d\d)([WLEAFTN])([a-z])", re.IGNORECASE)


def survey(folder: Path) -> _published.Survey:
    """Compare a folder with the published corpus.

    Args:
        folder: folder that contains the wav files, e.g. `wav/03a01Fa.wav`, at any depth.

    Returns:
        The survey, with one row per file: `speaker` is the number ("03"), `text` the code of the sentence ("a01");
        further `sex` and `version` (a, b... of the same speaker, sentence and emotion).
    """
    return _published.survey(folder, _parse, PUBLISHED)


def _parse(file: Path) -> tuple[str, _published.Row] | str:
    name = _NAME.fullmatch(file.stem)
    if not name or name[1] not in SEX:
        return "its name is not a speaker, a sentence, the letter of an emotion and a version"
    speaker, sentence, letter, version = name[1], name[2].lower(), name[3].upper(), name[4].lower()
    return f"{speaker}{sentence}{letter}{version}", {
        "speaker": speaker,
        "text": sentence,
        "emotion": EMOTIONS[letter],
        "sex": SEX[speaker],
        "version": version,
    }
