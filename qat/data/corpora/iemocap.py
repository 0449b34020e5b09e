"""IEMOCAP: ten actors in five sessions of two, scripted and improvised dialogues (Busso et al. 2008; licence form).

torchaudio's class for it lacks the utterances of five labels, valence, arousal and dominance, and the speaker of an
utterance; RH-Emo's training needs them.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from qat.data.corpora import _published

EMOTIONS = {
    "neu": "neutral",
    "ang": "angry",
    "hap": "happy",
    "sad": "sad",
    "exc": "excited",
    "fru": "frustrated",
    "fea": "fear",
    "sur": "surprise",
    "dis": "disgust",
    "oth": "other",
    "xxx": "no-agreement",
}

CLASSES = ("angry", "happy", "neutral", "sad")
"""The paper's four classes: 4490 utterances. RH-Emo's first stage takes all utterances."""

PUBLISHED = {
    "emotion": {
        "neutral": 1708,
        "angry": 1103,
        "happy": 595,
        "sad": 1084,
        "excited": 1041,
        "frustrated": 1849,
        "fear": 40,
        "surprise": 107,
        "disgust": 2,
        "other": 3,
        "no-agreement": 2507,
    },
    "session": {"1": 1819, "2": 1811, "3": 2136, "4": 2103, "5": 2170},
}
"""10,039 utterances."""

_UTTERANCE = re.compile(r"(Ses0([1-5])[FM]_(impro\d\d|script\d\d_\d)[a-z]?)_([FM])\w*")
_TURN = re.compile(r"\[[^\]]*\]\t(\w+)\t(\w+)\t\[([\d.]+),\s*([\d.]+),\s*([\d.]+)\]")
_LINE = re.compile(r"(\w+) \[[^\]]*\]:\s*(.*)")

log = logging.getLogger(__name__)


class Annotation(NamedTuple):
    """Consensus of the annotators; valence, arousal and dominance are means, from 1 to 5."""

    emotion: str
    valence: float
    arousal: float
    dominance: float


def survey(
    folder: Path, speaker: Literal["actor", "session"] = "actor", merge_excited: bool = False
) -> _published.Survey:
    """Compare a folder with the published corpus.

    Args:
        folder: `IEMOCAP_full_release`, with `Session1` to `Session5`, or one above it.
        speaker: content of the column `speaker`: the `actor`, as session and sex ("1F"), or the `session` with its two
            actors ("1"), as in the released code's speaker task.
        merge_excited: call excited utterances happy, as most later studies do and the paper does not.

    Returns:
        The survey, with one row per utterance, of any label (see `EMOTIONS`; empty without annotation): `text` is its
        transcript; further `session`, `sex`, `kind` (scripted or improvised), `script` (scene: "script01_1", "impro04",
        the same in all sessions), and `valence`, `arousal`, `dominance`.

    Raises:
        ValueError: an unknown option, or an annotation that cannot be read.
    """
    if speaker not in ("actor", "session"):
        raise ValueError(f"iemocap: option speaker={speaker!r} must be 'actor' or 'session'")
    survey = _published.Survey()
    files = _published.files(folder)
    sources, annotations, transcripts = _annotations(folder), {}, _transcripts(folder)
    for annotated in sources.values():
        annotations.update(annotated)
    unlabelled: Counter[str] = Counter()
    paths: dict[str, str] = {}
    for file in files:
        path, name = file.relative_to(folder).as_posix(), _UTTERANCE.fullmatch(file.stem)
        if not name:
            if file.parent.parent.name != "dialog":  # whole dialogues
                survey.unexpected.append((path, "its name is not that of an utterance"))
            continue
        if file.stem in paths:
            survey.unexpected.append((path, f"{file.stem} is there already: {paths[file.stem]}"))
            continue
        paths[file.stem] = path
        dialogue, session, script, sex = name.groups()
        annotation = annotations.get(file.stem)
        if annotation is None:
            if dialogue in sources:
                survey.missing.append((path, f"has no line in EmoEvaluation/{dialogue}.txt"))
            unlabelled[dialogue] += 1
            annotation = Annotation("", *[float("nan")] * 3)
        if merge_excited and annotation.emotion == "excited":
            annotation = annotation._replace(emotion="happy")
        survey.rows.append(
            {
                "path": path,
                "speaker": session + sex if speaker == "actor" else session,
                "text": transcripts.get(file.stem, ""),
                "session": session,
                "sex": "female" if sex == "F" else "male",
                "kind": "scripted" if script.startswith("script") else "improvised",
                "script": script,
                **annotation._asdict(),
            }
        )
    for dialogue, count in unlabelled.items():
        if dialogue not in sources:
            survey.missing.append((f"EmoEvaluation/{dialogue}.txt", f"is not there: {count} utterances have no label"))
    for dialogue, annotated in sources.items():
        for utterance in annotated.keys() - paths.keys():
            survey.missing.append((f"wav/{dialogue}/{utterance}.wav", "is annotated and not there"))
    survey.missing.sort()
    if unlabelled:
        log.warning("iemocap: %d utterances have no annotation", unlabelled.total())
    counts = {name: dict(counts) for name, counts in PUBLISHED.items()}
    if merge_excited:
        counts["emotion"]["happy"] += counts["emotion"].pop("excited")
    survey.compare(survey.rows, counts)
    return survey


def _annotations(folder: Path) -> dict[str, dict[str, Annotation]]:
    """Annotations by dialogue and utterance; of several lines with its name and a time, the first counts."""
    dialogues: dict[str, dict[str, Annotation]] = {}
    for file, lines in _texts(folder, "EmoEvaluation"):
        turns = dialogues.setdefault(file.stem, {})
        for number, line in enumerate(lines, 1):
            if not line.startswith("["):
                continue
            turn = _TURN.match(line)
            if not turn or turn[2] not in EMOTIONS:
                raise ValueError(
                    f"{file}: line {number}: {line!r} must be [times], utterance, label ({', '.join(EMOTIONS)}) and "
                    "[valence, arousal, dominance], separated by tabs"
                )
            turns.setdefault(turn[1], Annotation(EMOTIONS[turn[2]], *map(float, turn.groups()[2:])))
    return dialogues


def _transcripts(folder: Path) -> dict[str, str]:
    transcripts: dict[str, str] = {}
    for _, lines in _texts(folder, "transcriptions"):
        for line in lines:
            if match := _LINE.match(line):
                transcripts.setdefault(match[1], match[2].strip())
    return transcripts


def _texts(folder: Path, kind: str) -> Iterator[tuple[Path, list[str]]]:
    """The text files of the dialogues in folders of this name, and their lines."""
    for file in _published.files(folder, {".txt"}):
        if file.parent.name == kind:
            yield file, file.read_text(encoding="utf-8", errors="replace").splitlines()
