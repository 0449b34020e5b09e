"""From an experiment's settings to numbered samples: corpus, spectrograms, parts, labels, normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from qat.config import AnyExperiment, CorpusConfig, Experiment, SplitConfig, prefix_errors
from qat.data import corpora, splits
from qat.data.manifest import Manifest
from qat.data.rows import Rows
from qat.data.spectrogram import Normalisation, place_words, to_input, word_offsets
from qat.data.store import SpectrogramStore, prepare
from qat.files import problems_in_a_line
from qat.training import distributed
from qat.training.checkpoint import Checkpoint
from qat.training.examples import Examples

LABEL_COLUMN = {"emotion": "emotion", "speaker": "speaker", "word": "text", "word-presence": "words"}


@dataclass(frozen=True)
class Spectrograms:
    """Normalised spectrograms by sample number.

    Args:
        store: prepared spectrograms.
        normalisation: normalisation, fitted on the training part.
        placing: for words: draw the position in the canvas for each ``sample`` or each ``batch`` in training. None for
            other cuts, which never change.
    """

    store: SpectrogramStore
    normalisation: Normalisation
    placing: Literal["sample", "batch"] | None

    @classmethod
    def of(cls, store: SpectrogramStore, normalisation: Normalisation, experiment: AnyExperiment) -> Spectrograms:
        word = experiment.features.cut == "word"
        return cls(store, normalisation, experiment.training.word_offset if word else None)

    def rows(self, numbers: Tensor) -> Tensor:
        """Inputs `[B, 1, 512, 128]`, or words `[B, 170, 129]` that are yet to be placed on their canvas."""
        rows = self.normalisation(self.store.rows(numbers.tolist()))
        return to_input(rows) if self.placing is None else rows

    def offsets(self, count: int, generator: torch.Generator | None) -> Tensor:
        """First frame of each word in its canvas `[count]`: random with a generator (training), else centred."""
        assert self.placing is not None
        return word_offsets(count, "centre" if generator is None else self.placing, generator)

    def __call__(self, numbers: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Inputs `[B, 1, 512, 128]`; words are placed at random with a generator, else centred."""
        rows = self.rows(numbers)
        return rows if self.placing is None else place_words(rows, self.offsets(len(rows), generator))


@dataclass(frozen=True)
class Data:
    """An experiment's samples.

    Args:
        index: table with one row per sample: path, speaker, text, emotion...
        parts: sample numbers of ``train``, ``validation``, ``test`` and, with a confounded split, ``withheld``.
        spectrograms: spectrograms of the samples.
    """

    index: pd.DataFrame
    parts: dict[str, list[int]]
    spectrograms: Spectrograms

    @property
    def used(self) -> list[int]:
        """Numbers of the samples of all parts, in order."""
        return sorted(set().union(*self.parts.values()))

    def examples(self, **rows: Rows) -> Examples:
        """A source of batches from these rows; words are placed on their canvas batch by batch."""
        return Examples(rows, None if self.spectrograms.placing is None else self.spectrograms.offsets)


def read_corpus(config: CorpusConfig) -> Manifest:
    """The recordings of a corpus that match ``config.where``.

    Raises:
        ValueError: unknown corpus or column, empty folder, or no recording matches.
    """
    manifest = corpora.read(config.name, config.folder, **config.options)
    for column, values in config.where.items():
        if column not in manifest.table:
            columns = ", ".join(manifest.table.columns)
            raise ValueError(f"corpus.where: {config.name} has no column {column!r}; it has {columns}")
        manifest = manifest.filter(manifest.table[column].isin(values))
    return manifest


def labelled(manifest: Manifest, task: str) -> Manifest:
    """The recordings that have a label for ``task``.

    Raises:
        ValueError: no recording has one.
    """
    column = LABEL_COLUMN[task]
    if column not in manifest.table or not (manifest.table[column] != "").any():
        raise ValueError(f"task {task}: corpus {manifest.name} has no {column!r} labels")
    return manifest.filter(manifest.table[column] != "")


def recordings(experiment: AnyExperiment) -> Manifest:
    """The recordings that an experiment uses; for a classifier those that have a label.

    Raises:
        ValueError: see :func:`read_corpus` and :func:`labelled`.
    """
    manifest = read_corpus(experiment.corpus)
    return labelled(manifest, experiment.task) if isinstance(experiment, Experiment) else manifest


def normalisation_kind(experiment: AnyExperiment) -> str:
    """``max``, ``standard`` or ``log``; ``paper`` is the first with an embedding, the second without."""
    if isinstance(experiment, Experiment) and experiment.normalisation == "paper":
        return "max" if experiment.network.embeds else "standard"
    return experiment.normalisation


def problems_of(store: SpectrogramStore, strict: bool = False) -> list[dict[str, str]]:
    """Files that a store leaves out: ``path`` and ``problem`` of each.

    Raises:
        ValueError: there are some, and it is ``strict``.
    """
    problems: Any = store.skipped.rename(columns={"reason": "problem"}).to_dict("records")
    if problems and strict:
        raise ValueError(problems_in_a_line(problems))
    return list(problems)


def load_data(
    experiment: AnyExperiment, *, trained: Checkpoint | None = None, quiet: bool = False, strict: bool = False
) -> Data:
    """Read, prepare and split an experiment's corpus. Rank 0 prepares, then the others read.

    Args:
        experiment: settings.
        trained: checkpoint whose parts and normalisation are used instead of new ones.
        quiet: no progress bar.
        strict: a file that cannot be used is an error.

    Raises:
        ValueError: an error in the corpus, the files or the split; or the corpus lacks files of ``trained``.
    """
    manifest = recordings(experiment)
    with distributed.leader_first():
        store = prepare(manifest, experiment.features, experiment.cache, progress=not quiet)
    problems_of(store, strict)
    if trained is None:
        parts = divide(store.index, experiment.split, manifest.name)
        kind = normalisation_kind(experiment)
        with prefix_errors(store.folder):
            paths = store.index["path"].tolist()
            fitted = Normalisation.fit(kind, store.magnitudes, parts["train"], paths)  # type: ignore[arg-type]
    else:
        parts = _recorded_parts(store.index, trained)
        fitted = trained.normalisation
    return Data(store.index, parts, Spectrograms.of(store, fitted, experiment))


def divide(index: pd.DataFrame, config: SplitConfig, corpus: str = "") -> splits.Split:
    """Sample numbers of each part.

    Args:
        index: table of the samples.
        config: rule and its options.
        corpus: name of the corpus, which ``paper-actor`` depends on.

    Raises:
        ValueError: the rule does not fit the corpus, leaves a part empty, or lacks the speakers that it needs.
    """
    listed = {"train": config.train, "validation": config.validation, "test": config.test}
    if config.rule == "random":
        parts = splits.random(index, config.seed)
    elif config.rule == "speaker":
        parts = splits.by_speaker(index, config.seed, listed if any(listed.values()) else None, config.group)
    elif config.rule == "speaker-in-order":
        parts = splits.by_speaker(index, None, group=config.group)
    elif config.rule == "paper-actor":
        parts = splits.paper_actor(index, config.seed, corpus)
    elif config.rule == "folds":
        parts = splits.folds(index, config.seed, config.fold, config.folds, config.group)
    elif config.rule in ("part", "part-train-only"):
        parts = splits.by_part(index, only_train=config.rule == "part-train-only")
    else:
        parts = splits.confounded(index, config.seed, listed, config.leak)
    if "checksum" in index and config.rule != "part-train-only":
        parts = splits.without_copies(index, parts)
    for name in splits.PARTS:
        if not parts[name]:
            raise ValueError(f"split.rule {config.rule}: no sample in the {name} part")
    return {name: rows for name, rows in parts.items() if rows}


def _recorded_parts(index: pd.DataFrame, trained: Checkpoint) -> splits.Split:
    rows = index.groupby("path").indices
    recorded: dict[str, list[str]] = trained.value("files")
    if missing := [name for name in splits.PARTS if not recorded.get(name)]:
        raise ValueError(f"{trained.path}: its record has no files of the {missing[0]} part")
    parts = {}
    for name, files in recorded.items():
        if absent := [file for file in files if file not in rows]:
            raise ValueError(
                f"{trained.path}: the corpus has changed since: {len(absent)} files of the {name} part are not usable "
                f"now, the first being {absent[0]}"
            )
        parts[name] = [int(row) for file in files for row in rows[file]]
    return parts


def class_targets(
    index: pd.DataFrame, parts: dict[str, list[int]], task: str, classes: list[str] | None = None
) -> tuple[list[str], Tensor]:
    """Class names, sorted, and the target of every sample.

    Args:
        index: table of the samples.
        parts: sample numbers of each part; every class must occur in ``train``.
        task: task of :class:`qat.config.Experiment`.
        classes: class names of a trained network; by default those that occur.

    Returns:
        Names, and class numbers `[n]`, or zeros and ones `[n, V]` for ``word-presence``.

    Raises:
        ValueError: a class without training sample, or a label that is none of ``classes``.
    """
    labels = index[LABEL_COLUMN[task]]
    sets = [set(label.split()) for label in labels] if task == "word-presence" else [{label} for label in labels]
    used = sorted(set().union(*(sets[i] for part in parts.values() for i in part)))
    if classes is None:
        classes = used
        trained = set().union(*(sets[i] for i in parts["train"]))
        if absent := [name for name in used if name not in trained]:
            raise ValueError(f"task {task}: no training sample of class {', '.join(absent)}")
    elif unknown := [name for name in used if name not in classes]:
        raise ValueError(
            f"task {task}: label {', '.join(unknown)} is none of the network's classes {', '.join(classes)}"
        )
    number = {name: i for i, name in enumerate(classes)}
    if task == "word-presence":
        targets = torch.zeros(len(index), len(classes))
        for i, present in enumerate(sets):
            targets[i, [number[name] for name in present if name in number]] = 1
        return classes, targets
    return classes, torch.tensor([number.get(label, -1) for label in labels])


_RHEMO_CLASSES = (("neutral", "neu"), ("angry", "anger", "ang"), ("happy", "happiness", "hap"), ("sad", "sadness"))


def rhemo_targets(index: pd.DataFrame) -> Tensor:
    """Targets of RH-Emo `[n, 4]`: emotion class; valence, arousal and dominance as 0 (<= 2.5) or 1; NaN where unknown.

    Classes: neutral 0, angry 1, happy 2, sad 3 (in any case, or as anger, happiness, sadness), all others 4. Valence,
    arousal and dominance are on IEMOCAP's scale from 1 to 5.
    """
    number = {name: float(k) for k, names in enumerate(_RHEMO_CLASSES) for name in names}
    labels = [label.casefold() for label in index["emotion"]]
    emotion = torch.tensor([number.get(label, 4.0) if label else torch.nan for label in labels])
    columns = [emotion]
    for name in ("valence", "arousal", "dominance"):
        if name in index:
            value = torch.tensor(index[name].to_numpy(dtype="float32"))
            columns.append(torch.where(value.isnan(), value, (value > 2.5).float()))
        else:
            columns.append(torch.full_like(emotion, torch.nan))
    return torch.stack(columns, 1)
