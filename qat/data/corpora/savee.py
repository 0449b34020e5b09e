"""SAVEE: four British men say 120 sentences each with seven emotions (Haq and Jackson 2009; by registration)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qat.data.corpora import _published

EMOTIONS = {
    "a": "angry",
    "d": "disgust",
    "f": "fear",
    "h": "happy",
    "n": "neutral",
    "sa": "sad",
    "su": "surprise",
}
SPEAKERS = ("DC", "JE", "JK", "KL")

PUBLISHED = {
    "emotion": {emotion: 120 if emotion == "neutral" else 60 for emotion in EMOTIONS.values()},
    "speaker": dict.fromkeys(SPEAKERS, 120),
}
"""480 files: of each speaker 15 of an emotion and 30 neutral ones."""

_NAME = re.compile(rf"(?:({'|'.join(SPEAKERS)})_)?(sa|su|[adfhn])(\d\d)", re.IGNORECASE)


def survey(folder: Path) -> _published.Survey:
    """Compare a folder with the published corpus, in either layout in which it is published.

    Args:
        folder: folder with one folder per speaker (`AudioData/DC/a01.wav`) or all files in one (`ALL/DC_a01.wav`).

    Returns:
        The survey, with one row per file: `speaker` is DC, JE, JK or KL, `text` the code of emotion and sentence
        ("a01"). Three sentences are the same in all emotions, and the neutral ones repeat others; the codes do not show
        that.
    """
    return _published.survey(folder, _parse, PUBLISHED, lambda rows: sorted(_KNOWN))


def _parse(file: Path) -> tuple[str, _published.Row] | str:
    name = _NAME.fullmatch(file.stem)
    if not name:
        return "its name is not the letters of an emotion and two digits"
    speaker = (name[1] or file.parent.name).upper()
    if speaker not in SPEAKERS:
        return f"neither its name nor its folder tells a speaker, {', '.join(SPEAKERS)}"
    emotion = name[2].lower()
    code = f"{emotion}{name[3]}"
    if f"{speaker}_{code}" not in _KNOWN:
        return "no file of the published corpus has this number"
    return f"{speaker}_{code}", {"speaker": speaker, "text": code, "emotion": EMOTIONS[emotion]}


def _names() -> Iterator[str]:
    for speaker in SPEAKERS:
        for emotion in EMOTIONS:
            for number in range(1, 31 if emotion == "n" else 16):
                yield f"{speaker}_{emotion}{number:02}"


_KNOWN = frozenset(_names())
