"""The supported corpora, each a module.

Published corpora have `survey(folder)`, which lists the files and compares them with the publication. The others have
`read(folder)`, and `make` or `fetch`, as they need no licence form.
"""

from __future__ import annotations

import inspect
import unicodedata
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from qat.data.manifest import Manifest, build_manifest, check_files, read_manifest


@dataclass(frozen=True)
class About:
    """A corpus in a few words: its content, its source, and the layout of its folder.

    Args:
        utterances: number of files with an emotion, if there are any.
    """

    what: str
    source: str
    layout: str
    utterances: int = 0


CORPORA = {
    "demo": About(
        "synthesised speech: 18 voices, 16 sentences, 4 emotions, and single words",
        "qat corpus make demo",
        "sentences/Annie/00-angry.wav",
        1152,
    ),
    "fillets": About(
        "acted comedy dialogue in Czech and Dutch: 4 main voices, 3242 lines",
        "qat corpus fetch fillets",
        "usr/share/games/fillets-ng/",
    ),
    "hedgewars": About(
        "game phrases by 15 voice packs; emotion by the phrase",
        "qat corpus fetch hedgewars",
        "usr/share/games/hedgewars/",
        744,
    ),
    "gcin": About("Mandarin syllables by 2 speakers; tone as label", "qat corpus fetch gcin", "usr/share/gcin-voice/"),
    "iemocap": About(
        "10,039 utterances of dialogues, 10 actors in 5 sessions; emotion, valence, arousal, dominance",
        "https://sail.usc.edu/iemocap (licence form)",
        "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav, Session1/dialog/EmoEvaluation/*.txt",
        10_039,
    ),
    "ravdess": About(
        "24 actors, 2 sentences, 8 emotions: 1440 files of speech",
        "https://zenodo.org/records/1188976, Audio_Speech_Actors_01-24.zip (CC BY-NC-SA)",
        "Actor_01/03-01-01-01-01-01-01.wav",
        1440,
    ),
    "tess": About(
        "2 actresses, 200 words, 7 emotions: 2800 files",
        "https://doi.org/10.5683/SP2/E8H2MF (CC BY-NC-ND)",
        "OAF_back_angry.wav",
        2800,
    ),
    "emodb": About(
        "10 German actors, 10 sentences, 7 emotions: 535 files",
        "http://emodb.bilderbar.info/download",
        "wav/03a01Fa.wav",
        535,
    ),
    "emovo": About(
        "6 Italian actors, 14 sentences, 7 emotions: 588 files",
        "http://voice.fub.it/activities/corpora/emovo",
        "f1/dis-f1-b1.wav",
        588,
    ),
    "savee": About(
        "4 British men, 7 emotions: 480 files",
        "http://kahlan.eps.surrey.ac.uk/savee (registration)",
        "DC/a01.wav or DC_a01.wav",
        480,
    ),
    "cremad": About(
        "91 actors, 12 sentences, 6 emotions: 7442 files",
        "https://github.com/CheyneyComputerScience/CREMA-D, with Git LFS (ODbL)",
        "AudioWAV/1001_DFA_ANG_XX.wav",
        7442,
    ),
    "librispeech": About(
        "single words by 331 readers, from sentences with word alignments; no emotion",
        "https://www.openslr.org/12 (CC BY); alignments: https://github.com/bepierre/SpeechVGG or "
        "https://zenodo.org/records/2619474",
        "train-clean-100/103/1240/103-1240-0000.flac; word_labels/train-clean-100-selected-1000.txt or "
        "train-clean-100/103/1240/103-1240-0000.TextGrid",
    ),
}
"""The corpora by name."""

FOUR_EMOTIONS = 4490
"""Number of IEMOCAP's utterances of the four emotions that the paper uses."""

EMOTION = tuple(name for name, about in CORPORA.items() if about.utterances)
"""Corpora of emotions."""


def module(name: str) -> ModuleType:
    """The module of a corpus.

    Raises:
        ValueError: no such corpus.

    >>> module("gcin").__name__
    'qat.data.corpora.gcin'
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}; known are {', '.join(CORPORA)}, and csv for a manifest of your own")
    return import_module(f"{__name__}.{name}")


def options(name: str) -> list[str]:
    """Names of the options of a corpus's reader."""
    corpus = module(name)
    return list(inspect.signature(getattr(corpus, "survey", None) or corpus.read).parameters)[1:]


def read(name: str, folder: Path, **reader_options: Any) -> Manifest:
    """Read a corpus.

    Args:
        name: name in `CORPORA`, or `csv`.
        folder: folder of the corpus; for `csv` the manifest file.
        reader_options: options of the corpus's reader.

    Raises:
        ValueError: no such corpus or option, or the folder has none of its files.
    """
    _check_arguments(name, folder, reader_options)
    if name == "csv":
        return read_manifest(Path(folder))
    corpus = module(name)
    if not hasattr(corpus, "survey"):
        manifest: Manifest = corpus.read(Path(folder), **reader_options)
        return manifest
    return build_manifest(Path(folder), corpus.survey(Path(folder), **reader_options).rows, name)


@dataclass(frozen=True)
class Check:
    """Result of comparing a folder with a corpus.

    Args:
        manifest: files of the corpus in the folder.
        problems: table of files that are missing or cannot be used: `path` (empty if only a count is known) and
            `problem`.
        remarks: table, with the same columns, of files that are not part of the corpus or duplicate another.
    """

    manifest: Manifest
    problems: pd.DataFrame
    remarks: pd.DataFrame


def check(name: str, folder: Path, *, progress: bool = True, **reader_options: Any) -> Check:
    """Compare a folder with the published corpus, and try to read every file.

    Args:
        name: name in `CORPORA`, or `csv`.
        folder: folder of the corpus; for `csv` the manifest file.
        progress: show a progress bar.
        reader_options: options of the corpus's reader.

    Raises:
        ValueError: see `read`.
    """
    _check_arguments(name, folder, reader_options)
    missing: list[tuple[str, str]] = []
    unexpected: list[tuple[str, str]] = []
    if name != "csv" and hasattr(corpus := module(name), "survey"):
        survey = corpus.survey(Path(folder), **reader_options)
        missing, unexpected = survey.missing, survey.unexpected
        manifest = build_manifest(Path(folder), survey.rows, name)
    else:
        manifest = read(name, folder, **reader_options)
    columns = ["path", "problem"]
    problems = pd.concat([pd.DataFrame(missing, columns=columns), check_files(manifest, progress)], ignore_index=True)
    files = manifest.table.drop_duplicates("path")
    first = files.drop_duplicates("checksum").set_index("checksum")["path"]
    for path, checksum in files.loc[files["checksum"].duplicated(), ["path", "checksum"]].itertuples(index=False):
        unexpected.append((path, f"holds the same bytes as {first[checksum]}"))
    unexpected += [("", remark) for column in ("speaker", "emotion") for remark in _near_equal(manifest.table[column])]
    return Check(manifest, problems, pd.DataFrame(unexpected, columns=columns))


def _near_equal(labels: pd.Series) -> list[str]:
    """Labels that differ only in case, spaces or how their characters are composed."""
    spellings: dict[str, list[str]] = {}
    for label in sorted(set(labels)):
        plain = "".join(unicodedata.normalize("NFKC", label).casefold().split())
        spellings.setdefault(plain, []).append(label)
    return [
        f"{labels.name} has {' and '.join(map(repr, same))}, which are different labels"
        for same in spellings.values()
        if len(same) > 1
    ]


def _check_arguments(name: str, folder: Path, reader_options: dict[str, Any]) -> None:
    if name == "csv":
        if reader_options:
            raise ValueError(f"corpus csv: has no options, not {', '.join(reader_options)}")
        return
    allowed = options(name)
    if unknown := [option for option in reader_options if option not in allowed]:
        raise ValueError(f"corpus {name}: no option {', '.join(unknown)}; it has {', '.join(allowed) or 'none'}")
    if not Path(folder).is_dir() or not any(Path(folder).iterdir()):
        about = CORPORA[name]
        command = about.source.startswith("qat ")
        advice = f"fill it with `{about.source} --folder {folder}`" if command else f"get {name} from {about.source}"
        raise ValueError(f"{folder}: empty or no folder; {advice}")
