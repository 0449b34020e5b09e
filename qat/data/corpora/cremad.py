"""CREMA-D: 91 actors say twelve sentences with six emotions (Cao et al. 2014, Open Database License)."""

from __future__ import annotations

import re
from pathlib import Path

from qat.data.corpora import _published

EMOTIONS = {"ANG": "angry", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
SENTENCES = {
    "IEO": "it's eleven o'clock",
    "TIE": "that is exactly what happened",
    "IOM": "i'm on my way to the meeting",
    "IWW": "i wonder what this is about",
    "TAI": "the airplane is almost full",
    "MTI": "maybe tomorrow it will be cold",
    "IWL": "i would like a new alarm clock",
    "ITH": "i think i have a doctor's appointment",
    "DFA": "don't forget a jacket",
    "ITS": "i think i've seen this before",
    "TSI": "the surface is slick",
    "WSI": "we'll stop in a couple of minutes",
}
LEVELS = {"LO": "low", "MD": "medium", "HI": "high", "XX": "unspecified", "X": "unspecified"}
"""One published file ends in X: 1040_ITH_SAD_X.wav."""

PUBLISHED = {"emotion": {emotion: 1087 if emotion == "neutral" else 1271 for emotion in EMOTIONS.values()}}
"""7442 files. One of them, 1076_MTI_SAD_XX.wav, is known to hold no speech."""

_NAME = re.compile(
    rf"(10[0-8]\d|109[01])_({'|'.join(SENTENCES)})_({'|'.join(EMOTIONS)})_({'|'.join(LEVELS)})", re.IGNORECASE
)


def survey(folder: Path) -> _published.Survey:
    """Compare a folder with the published corpus.

    Args:
        folder: folder that contains `AudioWAV`, at any depth. Files of Git LFS that were not pulled are no audio.

    Returns:
        The survey, with one row per wav file: `speaker` is the actor ("1001"), `text` the sentence; further `level`,
        the intensity: low, medium, high or unspecified.
    """
    return _published.survey(folder, _parse, PUBLISHED, endings={".wav"})


def _parse(file: Path) -> tuple[str, _published.Row] | str:
    name = _NAME.fullmatch(file.stem)
    if not name or name[1] == "1000":
        return "its name is not an actor, a sentence, an emotion and a level"
    actor, sentence, emotion, level = (part.upper() for part in name.groups())
    return f"{actor}_{sentence}_{emotion}_{level}", {
        "speaker": actor,
        "text": SENTENCES[sentence],
        "emotion": EMOTIONS[emotion],
        "level": LEVELS[level],
    }
