"""Samples, targets and statistics."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qat.config import Experiment
from qat.data.manifest import Manifest
from qat.training.checkpoint import load_checkpoint
from qat.training.classifier import train_classifier
from qat.training.data import class_targets, load_data, rhemo_targets
from tests.qat.training.trainings import louder, trained


def test_rhemo_targets() -> None:
    index = pd.DataFrame(
        {"emotion": ["neutral", "Anger", "HAPPY", "sad", "bored"], "valence": [2.5, 2.6, 1, 5, np.nan]}
    )
    targets = rhemo_targets(index)
    assert targets[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert targets[:4, 1].tolist() == [0, 1, 0, 1]
    assert targets[4, 1].isnan()
    assert targets[:, 2:].isnan().all()


def test_words_move_in_training_and_are_centred_in_evaluation(experiment: Experiment) -> None:
    features = replace(experiment.features, cut="word")
    words = replace(experiment, task="word", features=features, normalisation="max")
    data = load_data(words, quiet=True)
    rows = torch.arange(6)
    drawn = [data.spectrograms(rows, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    first = [(x != 0).any(dim=(1, 3)).float().argmax(1) for x in (drawn[0], data.spectrograms(rows, None))]
    assert len(set(first[0].tolist())) > 1
    assert set(first[1].tolist()) == {171}
    per_batch = replace(words, training=replace(words.training, word_offset="batch"))
    x = load_data(per_batch, quiet=True).spectrograms(rows, torch.Generator().manual_seed(1))
    assert len(set((x != 0).any(dim=(1, 3)).float().argmax(1).tolist())) == 1


def test_a_class_without_training_sample_is_refused() -> None:
    index = pd.DataFrame({"emotion": ["sad", "happy", "angry"]})
    with pytest.raises(ValueError, match="no training sample of class angry, happy"):
        class_targets(index, {"train": [0], "validation": [1], "test": [2]}, "emotion")


def test_statistics_come_from_the_training_part_only(experiment: Experiment, corpus: Manifest, tmp_path: Path) -> None:
    train_classifier(trained(experiment, epochs=1), tmp_path / "run", quiet=True)
    split = json.loads((tmp_path / "run/split.json").read_text())
    saved = {}
    for part in ("test", "train", "validation"):
        (tmp_path / part).mkdir()
        loud = replace(trained(experiment, epochs=1), corpus=louder(corpus, tmp_path / part, split, part))
        train_classifier(loud, tmp_path / f"{part}-run", quiet=True)
        checkpoint = load_checkpoint(tmp_path / f"{part}-run", "classifier")
        saved[part] = checkpoint.record["normalisation"] | {"scale": checkpoint.tensors["embedding_scale"].item()}
    assert saved["test"] == saved["validation"]
    assert saved["train"]["maximum"] > 5 * saved["test"]["maximum"]
