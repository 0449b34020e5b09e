"""Evaluation of a trained classifier on its own parts or on another corpus, and its predictions for audio files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from qat.config import CorpusConfig
from qat.data.audio import AudioError, load_audio
from qat.data.rows import Rows
from qat.data.spectrogram import cut, place_words, to_input, word_offsets
from qat.data.store import prepare
from qat.models import SpeechClassifier
from qat.models.layers import placed
from qat.training import distributed
from qat.training.checkpoint import Checkpoint, load_checkpoint
from qat.training.data import Data, Spectrograms, class_targets, labelled, load_data, read_corpus
from qat.training.metrics import Metrics, metrics_for, probabilities
from qat.training.objectives import ClassificationObjective
from qat.training.run import evaluate_part
from qat.training.steps import Steps, precision


def load_classifier(checkpoint: Checkpoint) -> SpeechClassifier:
    """The trained classifier of a checkpoint, encoder included, frozen."""
    classifier = SpeechClassifier(checkpoint.experiment.network, len(checkpoint.classes))
    checkpoint.load_into(classifier)
    return classifier.requires_grad_(False)


def evaluate_run(
    run: Path, corpus: CorpusConfig | None = None, *, device: str = "auto", quiet: bool = False
) -> Metrics:
    """Evaluate a trained classifier on its own parts, or on every labelled clip of another corpus.

    Args:
        run: run folder or checkpoint.
        corpus: another corpus with the same labels; by default the parts that the run was split into.
        device: device, see :class:`qat.config.TrainingConfig`.
        quiet: no progress bar.

    Returns:
        Metrics by part; the only part is called ``all`` for another corpus.
    """
    checkpoint = load_checkpoint(run, "classifier")
    experiment = checkpoint.experiment
    with distributed.process_group(device) as where:
        if corpus is None:
            data = load_data(experiment, trained=checkpoint, quiet=quiet)
        else:
            manifest = labelled(read_corpus(corpus), experiment.task)
            store = prepare(manifest, experiment.features, experiment.cache, progress=not quiet)
            spectrograms = Spectrograms.of(store, checkpoint.normalisation, experiment)
            data = Data(store.index, {"all": list(range(len(store)))}, spectrograms)
        classes, targets = class_targets(data.index, data.parts, experiment.task, checkpoint.classes)
        objective = ClassificationObjective(
            placed(load_classifier(checkpoint), where), None, embedded=False, multi_label=experiment.multi_label
        )
        # Every sample is used once, so a table on the device would gain nothing.
        examples = data.examples(inputs=Rows(data.spectrograms.rows, where), targets=Rows(targets.to(where), where))
        steps = Steps(objective, examples, experiment.training, where, training=False)
        metrics_of = metrics_for(experiment, classes)
        return {
            part: evaluate_part(steps, torch.tensor(numbers), metrics_of)[0] for part, numbers in data.parts.items()
        }


def predict(
    run: Path, files: list[Path], *, device: str = "cpu", strict: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Classify audio files with a trained classifier.

    Args:
        run: run folder or checkpoint.
        files: audio files; the probabilities of a file are means over its cuts.
        device: device to compute on.
        strict: the first file that cannot be used is an error.

    Returns:
        One row per file: ``path``, ``predicted``, then the probability of every class; and one row per file that is
        missing, unreadable, silent or shorter than one window: ``path`` and ``problem``.

    Raises:
        ValueError: the checkpoint cannot be used; with ``strict``, a file.
    """
    checkpoint = load_checkpoint(run, "classifier")
    experiment, classes = checkpoint.experiment, checkpoint.classes
    where = distributed.device_of(device)
    classifier = load_classifier(checkpoint).eval().to(where)
    rows, problems = [], []
    with torch.no_grad(), precision(experiment.training.precision, where):
        for path in files:
            try:
                audio = load_audio(path, experiment.features.sample_rate)
            except AudioError as error:
                if strict:
                    raise ValueError(str(error)) from None
                problems.append({"path": str(path), "problem": str(error)})
                continue
            cuts = checkpoint.normalisation(cut(audio, experiment.features))
            word = experiment.features.cut == "word"
            x = place_words(cuts, word_offsets(len(cuts), "centre")) if word else to_input(cuts)
            p = probabilities(classifier(x.to(where)).float(), experiment).mean(0)
            row = {"path": str(path), "predicted": classes[int(p.argmax())]}
            rows.append(row | dict(zip(classes, p.tolist(), strict=True)))
    return pd.DataFrame(rows, columns=["path", "predicted", *classes]), pd.DataFrame(problems)
