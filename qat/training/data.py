"""From an experiment's settings to numbered samples: corpus, prepared spectrograms, parts, labels, normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from qat.config import AnyExperiment, CorpusConfig, Experiment, SplitConfig
from qat.data import corpora, splits
from qat.data.manifest import Manifest
from qat.data.spectrogram import Normalisation, place_words, to_input, word_offsets
from qat.data.store import SpectrogramStore, prepare
from qat.training import distributed

LABEL_COLUMN = {"emotion": "emotion", "speaker": "speaker", "word": "text", "word-presence": "words"}

Inputs = Callable[[Tensor, torch.Generator | None], Tensor]


@dataclass(frozen=True)
class Data:
    """An experiment's samples.

    Args:
        index: one row per sample: path, speaker, text, emotion...
        parts: sample numbers of ``train``, ``validation``, ``test`` and, after a confounded split, ``withheld``.
        normalisation: fitted on the training part.
        spectrograms: ``(indices [B], generator or None) -> [B, 1, 512, 128]``, normalised.
        varies: whether a sample looks different each time it is drawn in training.
    """

    index: pd.DataFrame
    parts: dict[str, list[int]]
    normalisation: Normalisation
    spectrograms: Inputs
    varies: bool


def read_corpus(config: CorpusConfig) -> Manifest:
    """The recordings of ``config``, those that ``config.where`` keeps.

    Raises:
        ValueError: unknown corpus, empty folder, unknown column, or nothing left.
    """
    manifest = corpora.read(config.name, config.folder)
    for column, values in config.where.items():
        if column not in manifest.table:
            known = ", ".join(manifest.table.columns)
            raise ValueError(f"corpus.where: {config.name} has no column {column!r}; it has {known}")
        manifest = manifest.filter(manifest.table[column].isin(values))
    return manifest


def labelled(manifest: Manifest, task: str) -> Manifest:
    """The recordings that have a label for ``task``.

    Raises:
        ValueError: none has.
    """
    column = LABEL_COLUMN[task]
    if column not in manifest.table or not (manifest.table[column] != "").any():
        raise ValueError(f"task {task}: corpus {manifest.name} has no {column!r} labels")
    return manifest.filter(manifest.table[column] != "")


def load_data(experiment: AnyExperiment, normalisation: str, *, quiet: bool = False) -> Data:
    """Read, prepare and split what ``experiment`` names. Rank 0 prepares; the others then read.

    Args:
        experiment: what to load.
        normalisation: kind, ``max``, ``standard`` or ``log``.
        quiet: no progress bar.

    Raises:
        ValueError: whatever is wrong with the corpus, the files or the split.
    """
    manifest = read_corpus(experiment.corpus)
    if isinstance(experiment, Experiment):
        manifest = labelled(manifest, experiment.task)
    if distributed.rank() == 0:
        prepare(manifest, experiment.features, experiment.cache, progress=not quiet)
    distributed.barrier()
    store = prepare(manifest, experiment.features, experiment.cache, progress=False)
    parts = divide(store.index, experiment.split)
    for name in ("train", "validation"):
        if not parts[name]:
            raise ValueError(f"split.rule {experiment.split.rule}: no sample in the {name} part")
    fitted = Normalisation.fit(normalisation, store.magnitudes, parts["train"])  # type: ignore[arg-type]
    return Data(store.index, parts, fitted, inputs_of(store, fitted, experiment), experiment.features.cut == "word")


def divide(index: pd.DataFrame, config: SplitConfig) -> splits.Split:
    """Sample numbers of each part by the rule of ``config``.

    Raises:
        ValueError: the rule does not fit the corpus, or the confounded rule was given no speakers.
    """
    listed = {"train": config.train, "validation": config.validation, "test": config.test}
    if config.rule == "random":
        return splits.random(index, config.seed)
    if config.rule == "speaker":
        return splits.by_speaker(index, config.seed, listed if any(listed.values()) else None)
    return splits.confounded(index, config.seed, listed, config.leak)


def inputs_of(store: SpectrogramStore, normalisation: Normalisation, experiment: AnyExperiment) -> Inputs:
    """Normalised network inputs by sample number; words are placed anew for each draw in training."""

    def inputs(indices: Tensor, generator: torch.Generator | None) -> Tensor:
        rows = normalisation(store.rows(indices.tolist()))
        if experiment.features.cut != "word":
            return to_input(rows)
        placing = "centre" if generator is None else experiment.training.word_offset
        return place_words(rows, word_offsets(len(rows), placing, generator))

    return inputs


def class_targets(
    index: pd.DataFrame, parts: dict[str, list[int]], task: str, classes: list[str] | None = None
) -> tuple[list[str], Tensor]:
    """Class names, sorted, and every sample's target.

    Args:
        index: the samples.
        parts: where a class must occur in ``train``.
        task: as in :class:`qat.config.Experiment`.
        classes: fixed names (evaluation of a trained network) instead of those that occur.

    Returns:
        Names, and `[n]` class numbers, or `[n, V]` of 0 and 1 for ``word-presence``.

    Raises:
        ValueError: a class without training sample, or a label that a trained network does not know.
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


_RHEMO_CLASSES = {"neutral": 0, "neu": 0, "angry": 1, "ang": 1, "happy": 2, "hap": 2, "sad": 3}


def rhemo_targets(index: pd.DataFrame) -> Tensor:
    """RH-Emo's targets `[n, 4]`: emotion class; valence, arousal, dominance as 0 (<= 2.5) or 1; NaN where unknown."""
    emotion = torch.tensor([float(_RHEMO_CLASSES.get(label, 4)) if label else torch.nan for label in index["emotion"]])
    columns = [emotion]
    for name in ("valence", "arousal", "dominance"):
        if name in index:
            value = torch.tensor(index[name].to_numpy(dtype="float32"))
            columns.append(torch.where(value.isnan(), value, (value > 2.5).float()))
        else:
            columns.append(torch.full_like(emotion, torch.nan))
    return torch.stack(columns, 1)
