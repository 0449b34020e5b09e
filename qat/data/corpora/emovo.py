"""EMOVO: six Italian actors say fourteen sentences with seven emotions (Costantini et al. 2014)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qat.data.corpora import _published

EMOTIONS = {
    "dis": "disgust",
    "gio": "happy",
    "neu": "neutral",
    "pau": "fear",
    "rab": "angry",
    "sor": "surprise",
    "tri": "sad",
}
"""By the Italian word: disgusto, gioia, neutro, paura, rabbia, sorpresa, tristezza."""

PUBLISHED = {
    "emotion": dict.fromkeys(EMOTIONS.values(), 84),
    "speaker": dict.fromkeys(("f1", "f2", "f3", "m1", "m2", "m3"), 98),
}
"""588 files."""

_NAME = re.compile(rf"({'|'.join(EMOTIONS)})-([fm][123])-([a-z]\d)", re.IGNORECASE)


def survey(folder: Path) -> _published.Survey:
    """Compare a folder with the published corpus.

    Args:
        folder: folder that contains the speakers' folders, e.g. `EMOVO/f1/dis-f1-b1.wav`, at any depth.

    Returns:
        The survey, with one row per file: `speaker` is "f1" to "m3", `text` the code of the sentence ("b1"); further
        `sex`.
    """
    return _published.survey(folder, _parse, PUBLISHED, _names)


def _parse(file: Path) -> tuple[str, _published.Row] | str:
    name = _NAME.fullmatch(file.stem)
    if not name:
        return "its name is not an emotion, a speaker and a sentence"
    emotion, speaker, sentence = (part.lower() for part in name.groups())
    return f"{emotion}-{speaker}-{sentence}", {
        "speaker": speaker,
        "text": sentence,
        "emotion": EMOTIONS[emotion],
        "sex": "female" if speaker[0] == "f" else "male",
    }


def _names(rows: list[_published.Row]) -> Iterator[str]:
    """Names of all combinations of the present sentences with every speaker and emotion."""
    for sentence in sorted({row["text"] for row in rows}):
        yield from (f"{emotion}-{speaker}-{sentence}" for emotion in EMOTIONS for speaker in PUBLISHED["speaker"])
