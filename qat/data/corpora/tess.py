"""TESS: two actresses say 200 words with seven emotions (Pichora-Fuller and Dupuis 2020, CC BY-NC-ND 4.0)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qat.data.corpora import _published

EMOTIONS = {
    "angry": "angry",
    "disgust": "disgust",
    "fear": "fear",
    "happy": "happy",
    "neutral": "neutral",
    "ps": "surprise",
    "sad": "sad",
}
"""Last part of the file name; `ps` is pleasant surprise."""

PUBLISHED = {"emotion": dict.fromkeys(EMOTIONS.values(), 400), "speaker": {"OAF": 1400, "YAF": 1400}}
"""2800 files."""

# One published file has the prefix OA: OA_bite_neutral.wav.
_NAME = re.compile(rf"(OAF?|YAF)_([a-z-]+)_({'|'.join(EMOTIONS)})", re.IGNORECASE)


def survey(folder: Path) -> _published.Survey:
    """Compare a folder with the published corpus.

    Args:
        folder: folder that contains the wav files, e.g. `OAF_back_angry.wav`, at any depth.

    Returns:
        The survey, with one row per file: `speaker` is OAF (aged 64) or YAF (26), `text` the word after "Say the
        word".
    """
    return _published.survey(folder, _parse, PUBLISHED, _names)


def _parse(file: Path) -> tuple[str, _published.Row] | str:
    name = _NAME.fullmatch(file.stem)
    if not name:
        return "its name is not OAF or YAF, a word and an emotion"
    prefix, word, emotion = name[1].upper(), name[2].lower(), name[3].lower()
    speaker = "YAF" if prefix == "YAF" else "OAF"
    return f"{speaker}_{word}_{emotion}", {"speaker": speaker, "text": word, "emotion": EMOTIONS[emotion]}


def _names(rows: list[_published.Row]) -> Iterator[str]:
    """Names of all combinations of the present words with both actresses and every emotion."""
    for word in sorted({row["text"] for row in rows}):
        yield from (f"{speaker}_{word}_{emotion}" for speaker in PUBLISHED["speaker"] for emotion in EMOTIONS)
