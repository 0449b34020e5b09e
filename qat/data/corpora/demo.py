"""The demo corpus: synthesised speech, generated in a short time with the same bytes in every run.

eSpeak NG voices speak neutral sentences with four settings of rate, volume, pitch and pitch range that stand for
emotions, each jittered by 12 %; the training voices also speak single words, for the word task. It is a corpus to try
the method on, not evidence about human speech. eSpeak NG comes with the package `espeakng-loader` (GPL-3); no part of
it is shipped here.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import traceback
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from numpy.typing import NDArray

from qat.data.manifest import Manifest, read_manifest, write_manifest
from qat.files import make_once, read_json, write_text
from qat.processes import bar, process_map

VOICES: Mapping[str, Sequence[str]] = {
    "train": ("f2", "f5", "Annie", "belinda", "m1", "m3", "m7", "Andy", "max"),
    "validation": ("f3", "m2", "Lee"),
    "test": ("f1", "linda", "Alicia", "m4", "pablo", "michel"),
}
"""eSpeak NG variants of American English, female and male in every part."""

EMOTIONS: Mapping[str, tuple[float, float, float, float]] = {
    "angry": (200, 180, 55, 75),
    "happy": (195, 120, 70, 90),
    "neutral": (165, 100, 50, 50),
    "sad": (125, 70, 35, 20),
}
"""Words per minute, volume (100 = normal), pitch and pitch range (50 = normal)."""

SENTENCES = (
    "The parcel is under the table.",
    "My brother has seven green bottles.",
    "The window opens on the garden.",
    "We put the basket near the river.",
    "Her letter came on Monday morning.",
    "The doctor carried a yellow lamp.",
    "The number on the door is seven.",
    "She keeps the paper in a drawer.",
    "A brown horse stands by the water.",
    "The train leaves from the station.",
    "He painted the kitchen ceiling white.",
    "The market opens early on Sunday.",
    "There is butter on the table.",
    "You can borrow the silver pencil.",
    "The engine is behind the station.",
    "They walk along the river bank.",
)
"""Sentences without emotional content, about 1.5 s each."""

# fmt: off
WORDS = (
    "parcel", "table", "brother", "seven", "bottles", "window", "garden", "basket",
    "river", "letter", "monday", "doctor", "yellow", "lamp", "number", "paper",
    "horse", "water", "train", "kitchen", "market", "butter", "pencil", "engine",
)
# fmt: on
"""Single words that the training voices speak; all occur in the sentences."""

JITTER = 0.12
"""Relative standard deviation of each setting. A linear model gets 0.99 on unseen voices from the jittered settings and
0.54 from mean log spectra: learnable but not trivial."""

_LIMITS = ((80, 450), (0, 200), (0, 99), (0, 99))
_PEAK = 0.9
_DONE = "recipe.json"


@dataclass(frozen=True)
class Utterance:
    """A clip to synthesise; `settings` are rate, volume, pitch and pitch range."""

    path: str
    voice: str
    text: str
    settings: tuple[int, ...]


def make(
    folder: Path,
    *,
    voices: Mapping[str, Sequence[str]] = VOICES,
    sentences: Sequence[str] = SENTENCES,
    words: Sequence[str] = WORDS,
    seed: int = 1,
    workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Synthesise the demo corpus: all sentences by all voices and all words by the training voices, in each emotion.

    The same arguments give the same bytes, for any number of workers. A folder that already holds the corpus is only
    read; an interrupted run leaves nothing behind. Another process that makes it meanwhile is waited for.

    Args:
        folder: new folder for the corpus.
        voices: eSpeak NG voice variants of the parts train, validation and test.
        sentences: sentences that all voices say.
        words: single words for the word task.
        seed: seed of the jitter.
        workers: number of processes; None takes the available cores.
        progress: show a progress bar.

    Returns:
        The manifest, with the further columns `kind` (sentence or word), `part` (of the voice), `words` (the spoken
        words, lower-case) and `source`.

    Raises:
        ValueError: espeakng-loader is not installed, an unknown voice, or the folder holds something else.

    Source: espeak-ng 1.52; settings and jitter as in the method's feasibility study.
    """
    folder = Path(folder)
    rows, utterances = _plan(voices, sentences, words, seed)
    recipe = hashlib.sha256(json.dumps([astuple(utterance) for utterance in utterances]).encode()).hexdigest()

    def is_made(folder: Path) -> bool:
        return (folder / _DONE).is_file() and read_json(folder / _DONE, "recipe")["recipe"] == recipe

    def speak(draft: Path) -> None:
        library, data = _espeak()
        variants = {file.name for file in (data / "voices" / "!v").iterdir()}
        for voice in [voice for part in voices.values() for voice in part]:
            if voice not in variants:
                raise ValueError(f"voices: eSpeak NG has no variant {voice!r}; it has {', '.join(sorted(variants))}")
        for parent in {(draft / utterance.path).parent for utterance in utterances}:
            parent.mkdir(parents=True)
        # At least one process: eSpeak's state must never be shared with the caller.
        with process_map(workers or None, _initialise, library, data) as run, bar(progress) as progress_bar:
            task = progress_bar.add_task("Synthesise speech", total=len(utterances))
            groups = [utterances[start : start + len(EMOTIONS)] for start in range(0, len(utterances), len(EMOTIONS))]
            facts: list[tuple[float, str]] = []
            for spoken in run(partial(_speak, draft), groups):
                facts += spoken
                progress_bar.advance(task, len(spoken))
        table = pd.DataFrame(rows).join(pd.DataFrame(facts, columns=["duration", "checksum"]))
        write_manifest(Manifest(draft, table, "demo"), draft / "manifest.csv")
        write_text(
            draft / "README.txt",
            "Synthesised speech, not recordings: eSpeak NG voices, made by `qat corpus make demo`.\n"
            "manifest.csv has one row per clip.\n",
        )
        write_text(draft / _DONE, json.dumps({"recipe": recipe}) + "\n")

    make_once(folder, speak, is_made)
    return read(folder)


def read(folder: Path) -> Manifest:
    """Read a demo corpus.

    Raises:
        ValueError: there is none in the folder.
    """
    if not (folder / _DONE).is_file():
        raise ValueError(f"{folder}: holds no demo corpus; make it with `qat corpus make demo --folder {folder}`")
    return read_manifest(folder / "manifest.csv", name="demo")


def _plan(
    voices: Mapping[str, Sequence[str]], sentences: Sequence[str], words: Sequence[str], seed: int
) -> tuple[list[dict[str, str]], list[Utterance]]:
    """The manifest's rows, and the utterance of each."""
    rows, utterances = [], []
    for kind, texts in (("sentence", sentences), ("word", words)):
        for part in voices if kind == "sentence" else ("train",):
            for voice in voices[part]:
                for number, text in enumerate(texts):
                    for emotion in EMOTIONS:
                        path = f"{kind}s/{voice}/{number:02d}-{emotion}.wav"
                        spoken_words = " ".join(re.findall("[a-z']+", text.lower()))
                        rows.append(
                            {"path": path, "speaker": voice, "text": text, "emotion": emotion}
                            | {"kind": kind, "part": part, "words": spoken_words, "source": "synthesised speech"}
                        )
                        utterances.append(Utterance(path, voice, text, _settings(voice, text, emotion, seed)))
    return rows, utterances


def _settings(voice: str, text: str, emotion: str, seed: int) -> tuple[int, ...]:
    generator = np.random.default_rng([seed, zlib.crc32(f"{voice}|{text}|{emotion}".encode())])
    jittered = np.asarray(EMOTIONS[emotion]) * (1 + JITTER * generator.standard_normal(4))
    low, high = zip(*_LIMITS, strict=True)
    return tuple(int(value) for value in np.clip(jittered.round(), low, high))


# Below: eSpeak NG through ctypes. Its state leaks from one utterance to the next, so the library is initialised once
# per process, and a fork of that process speaks one text of one voice in all emotions: always in the same order after
# the same start, so the bytes do not depend on what else is spoken. A fork for each utterance would take 1.5 times as
# long.

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_SYNCHRONOUS = 2
_UTF8 = 1
_WAV_HEADER = 44  # bytes before the samples
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4

_library: ctypes.CDLL
_sample_rate: int
_spoken: list[NDArray[np.int16]] = []


def _espeak() -> tuple[Path, Path]:
    try:
        import espeakng_loader
    except ImportError as error:
        raise ValueError(
            "the demo corpus needs the package espeakng-loader; install it with `pip install -e '.[demo]'`"
        ) from error
    return Path(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())


@_CALLBACK  # type: ignore[untyped-decorator]
def _collect(wave: ctypes._Pointer[ctypes.c_short], count: int, events: object) -> int:
    if wave and count > 0:
        _spoken.append(np.ctypeslib.as_array(wave, (count,)).copy())
    return 0


def _initialise(library: Path, data: Path) -> None:
    global _library, _sample_rate
    _library = ctypes.CDLL(str(library))
    _sample_rate = _library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), 0)
    if _sample_rate <= 0:
        raise RuntimeError(f"eSpeak NG does not start with the data in {data}")
    _library.espeak_SetSynthCallback(_collect)


def _speak(folder: Path, group: Sequence[Utterance]) -> list[tuple[float, str]]:
    """Speak some utterances to files in a fork of this process; return each file's seconds and checksum."""
    child = os.fork()
    if child == 0:
        try:
            for utterance in group:
                _synthesise(folder / utterance.path, utterance)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"eSpeak NG failed on {group[0]} with status {os.waitstatus_to_exitcode(status)}")
    contents = [(folder / utterance.path).read_bytes() for utterance in group]
    return [
        (round((len(content) - _WAV_HEADER) / 2 / _sample_rate, 6), hashlib.sha256(content).hexdigest())
        for content in contents
    ]


def _synthesise(file: Path, utterance: Utterance) -> None:
    text = utterance.text.encode() + b"\0"
    failed = _library.espeak_SetVoiceByName(f"en-us+{utterance.voice}".encode())
    for parameter, value in zip((_RATE, _VOLUME, _PITCH, _RANGE), utterance.settings, strict=True):
        failed |= _library.espeak_SetParameter(parameter, value, 0)
    failed |= _library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    failed |= _library.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 0, 0, _UTF8, None, None)
    failed |= _library.espeak_Synchronize()
    if failed or not _spoken:
        raise RuntimeError(f"eSpeak NG gave no sound, status {failed}")
    samples = np.concatenate(_spoken).astype(np.float64)
    _spoken.clear()
    scaled = np.round(samples * (_PEAK * 32767 / np.abs(samples).max())).astype(np.int16)
    soundfile.write(file, scaled, _sample_rate, subtype="PCM_16")
