"""RAVDESS, speech: 24 actors say two statements with eight emotions (Livingstone and Russo 2018, CC BY-NC-SA 4.0)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qat.data.corpora import _published

EMOTIONS = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fear",
    "07": "disgust",
    "08": "surprise",
}
STATEMENTS = {"01": "kids are talking by the door", "02": "dogs are sitting by the door"}
ACTORS = [f"{actor:02}" for actor in range(1, 25)]

PUBLISHED = {
    "emotion": {emotion: 96 if emotion == "neutral" else 192 for emotion in EMOTIONS.values()},
    "speaker": dict.fromkeys(ACTORS, 60),
}
"""1440 files; neutral has no strong intensity."""

_NAME = re.compile(r"(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)")


def survey(folder: Path) -> _published.Survey:
    """Compare a folder with the published corpus.

    Args:
        folder: folder that contains `Actor_01` to `Actor_24`, at any depth.

    Returns:
        The survey, with one row per file: `speaker` is the actor ("01"), `text` the statement; further `sex`,
        `intensity` (normal or strong) and `repetition`.
    """
    return _published.survey(folder, _parse, PUBLISHED, lambda rows: sorted(_KNOWN))


def _parse(file: Path) -> tuple[str, _published.Row] | str:
    name = _NAME.fullmatch(file.stem)
    if not name:
        return "its name is not seven numbers of two digits"
    modality, channel, emotion, intensity, statement, repetition, actor = name.groups()
    if channel == "02":
        return "song, not speech (second number 02)"
    if modality != "03":
        return f"video, not audio only (first number {modality})"
    if file.stem not in _KNOWN:
        return "no file of the published corpus has this name"
    return file.stem, {
        "speaker": actor,
        "text": STATEMENTS[statement],
        "emotion": EMOTIONS[emotion],
        "sex": "male" if int(actor) % 2 else "female",
        "intensity": "strong" if intensity == "02" else "normal",
        "repetition": repetition,
    }


def _names() -> Iterator[str]:
    for actor in ACTORS:
        for emotion in EMOTIONS:
            for intensity in ("01", "02")[: 1 if emotion == "01" else 2]:
                for statement in STATEMENTS:
                    for repetition in ("01", "02"):
                        yield f"03-01-{emotion}-{intensity}-{statement}-{repetition}-{actor}"


_KNOWN = frozenset(_names())
