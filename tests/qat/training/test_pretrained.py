"""Checkpoints that a training builds on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.config import (
    Experiment,
    RHEmoConfig,
    RHEmoExperiment,
)
from qat.data.manifest import Manifest
from qat.training.checkpoint import load_checkpoint
from qat.training.classifier import train_classifier
from qat.training.rhemo import pretrain_rhemo
from tests.qat.training.trainings import trained, weights, with_twin


def test_starting_from_another_number_of_classes_keeps_all_but_the_last_layer(
    experiment: Experiment, twin: Path, tmp_path: Path
) -> None:
    train_classifier(trained(experiment, initial=twin, lr=1e-12, epochs=1), tmp_path / "run", quiet=True)
    before, after = weights(twin), weights(tmp_path / "run")
    changed = [
        k for k in before if before[k].shape != after[k].shape or not torch.allclose(before[k], after[k], atol=1e-9)
    ]
    assert changed == ["net.classifier.6.bias", "net.classifier.6.weight"]


def test_the_last_layer_can_be_initialised_anew_where_the_classes_are_the_same(
    experiment: Experiment, tmp_path: Path
) -> None:
    train_classifier(trained(experiment, epochs=1), tmp_path / "first", quiet=True)
    new = trained(experiment, initial=tmp_path / "first", initial_head="new", lr=1e-12, epochs=1)
    train_classifier(new, tmp_path / "new", quiet=True)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "new")
    changed = [k for k in before if not torch.allclose(before[k], after[k], atol=1e-9)]
    assert "net.classifier.6.weight" in changed
    assert set(changed) <= {"net.classifier.6.bias", "net.classifier.6.weight"}


def test_a_trained_encoder_goes_on_in_the_second_half(experiment: Experiment, tmp_path: Path) -> None:
    network = replace(experiment.network, rhemo_mode="trainable", embedding_scale="none")
    first = trained(replace(experiment, network=network), epochs=1)
    train_classifier(first, tmp_path / "first", quiet=True)
    second = trained(first, initial=tmp_path / "first", lr=1e-12, epochs=1)
    train_classifier(second, tmp_path / "second", quiet=True)
    before, after, pretrained = (
        load_checkpoint(path, kind).part("encoder")["0.weight"]
        for path, kind in (
            (tmp_path / "first", "classifier"),
            (tmp_path / "second", "classifier"),
            (network.rhemo, "rhemo"),
        )
    )
    assert torch.allclose(before, after, atol=1e-9)
    assert not torch.allclose(pretrained, after, atol=1e-6)


def test_twins_that_do_not_fit_are_refused(experiment: Experiment, twin: Path, rhemo: Path, tmp_path: Path) -> None:
    wide = replace(experiment.network, width=0.03)
    for change, message in (
        (replace(with_twin(experiment, twin), network=wide), "has network.width 0.01, this experiment has 0.03"),
        (with_twin(experiment, rhemo), "of kind 'rhemo', but 'classifier' is needed"),
        (with_twin(experiment, tmp_path / "absent"), "no such checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            train_classifier(change, tmp_path / "run", quiet=True)


def test_twin_of_another_embedding_is_refused(
    experiment: Experiment, twin: Path, tmp_path: Path, corpus: Manifest, cache: Path
) -> None:
    other = RHEmoExperiment(
        corpus=experiment.corpus,
        normalisation="log",
        rhemo=RHEmoConfig(width=0.01),
        training=replace(experiment.training, seed=5, epochs=1),
        cache=cache,
    )
    pretrain_rhemo(other, tmp_path / "rhemo", quiet=True)
    network = replace(experiment.network, rhemo=tmp_path / "rhemo")
    with pytest.raises(ValueError, match="embedding of another RH-Emo"):
        train_classifier(replace(with_twin(experiment, twin), network=network), tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: replace(e, normalisation="max"),
        lambda e: replace(e, features=replace(e.features, time_order="reversed")),
    ],
)
def test_networks_trained_on_other_inputs_are_refused(
    experiment: Experiment, twin: Path, change: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"network\.rhemo: .* was trained with .*; they must be equal"):
        train_classifier(change(experiment), tmp_path / "run", quiet=True)
    real = replace(experiment.network, domain="real", embedding_scale="none")
    plain = trained(replace(experiment, network=real), epochs=1)
    train_classifier(plain, tmp_path / "twin", quiet=True)
    with pytest.raises(ValueError, match=r"anti_transfer\.twin: .* was trained with .*; they must be equal"):
        train_classifier(change(with_twin(plain, tmp_path / "twin")), tmp_path / "run", quiet=True)
