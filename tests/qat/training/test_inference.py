"""Evaluation and predictions of trained classifiers."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from qat import cli
from qat.config import (
    CorpusConfig,
    Experiment,
)
from qat.data.manifest import Manifest, write_manifest
from qat.training.checkpoint import load_checkpoint
from qat.training.classifier import train_classifier
from qat.training.inference import evaluate_run, load_classifier, predict
from tests.qat.training.trainings import trained


def test_evaluate_gives_the_runs_own_numbers_again(
    experiment: Experiment, corpus: Manifest, twin: Path, tmp_path: Path
) -> None:
    result = train_classifier(experiment, tmp_path / "run", quiet=True)
    again = evaluate_run(tmp_path / "run", device="cpu", quiet=True)
    for part, metrics in result["parts"].items():
        assert again[part]["accuracy"] == pytest.approx(metrics["accuracy"])
        assert again[part]["confusion"] == metrics["confusion"]
        assert again[part]["cross_entropy"] == pytest.approx(metrics["cross_entropy"], rel=1e-4)
    everything = evaluate_run(tmp_path / "run", CorpusConfig("csv", corpus.root / "tiny.csv"), device="cpu", quiet=True)
    counts = {part: m["samples"] for part, m in result["parts"].items()}
    right = sum(m["accuracy"] * m["samples"] for m in result["parts"].values())
    assert everything["all"]["samples"] == sum(counts.values()) == 36
    assert everything["all"]["accuracy"] == pytest.approx(right / 36)


def test_evaluate_refuses_labels_that_the_network_does_not_know(
    experiment: Experiment, corpus: Manifest, tmp_path: Path
) -> None:
    train_classifier(trained(experiment, epochs=1), tmp_path / "run", quiet=True)
    table = corpus.table.assign(emotion="furious")
    write_manifest(replace(corpus, table=table), corpus.root / "furious.csv")
    with pytest.raises(ValueError, match="label furious is none of the network's classes angry, neutral, sad"):
        evaluate_run(tmp_path / "run", CorpusConfig("csv", corpus.root / "furious.csv"), quiet=True)


def test_predict_agrees_with_the_recorded_predictions(experiment: Experiment, corpus: Manifest, tmp_path: Path) -> None:
    train_classifier(experiment, tmp_path / "run", quiet=True)
    recorded = pd.read_csv(tmp_path / "run/predictions.csv").set_index("path")
    paths = list(recorded.index[:5])
    predicted, problems = predict(tmp_path / "run", [corpus.root / p for p in paths])
    assert problems.empty
    assert predicted["predicted"].tolist() == recorded.loc[paths, "predicted"].tolist()
    for name in ("angry", "neutral", "sad"):
        np.testing.assert_allclose(predicted[name], recorded.loc[paths, f"p_{name}"], atol=1e-4)


def test_predict_names_what_it_cannot_read_and_goes_on(
    experiment: Experiment, corpus: Manifest, tmp_path: Path
) -> None:
    train_classifier(trained(experiment, epochs=1), tmp_path / "run", quiet=True)
    soundfile.write(tmp_path / "short.wav", np.ones(100), 16000)
    (tmp_path / "text.wav").write_text("no audio")
    good = corpus.root / corpus.table["path"][0]
    bad = {"short.wav": "fewer than one window", "text.wav": "cannot be decoded", "no.wav": "no such"}
    predicted, problems = predict(tmp_path / "run", [*(tmp_path / name for name in bad), good])
    assert predicted["path"].tolist() == [str(good)]
    assert problems["path"].tolist() == [str(tmp_path / name) for name in bad]
    assert all(why in problem for why, problem in zip(bad.values(), problems["problem"], strict=True))
    assert cli.main(["predict", str(tmp_path / "run"), str(good), str(tmp_path / "no.wav"), "--json"]) == 1
    assert cli.main(["predict", str(tmp_path / "run"), str(good), "--json"]) == 0


def test_evaluation_uses_the_parts_that_were_trained_on_even_when_the_corpus_has_grown(
    experiment: Experiment, corpus: Manifest, tmp_path: Path
) -> None:
    half = corpus.filter(corpus.table["text"] != "two")
    write_manifest(half, corpus.root / "growing.csv")
    run = replace(experiment, corpus=CorpusConfig("csv", corpus.root / "growing.csv"))
    result = train_classifier(run, tmp_path / "run", quiet=True)
    write_manifest(corpus, corpus.root / "growing.csv")
    again = evaluate_run(tmp_path / "run", device="cpu", quiet=True)
    assert {p: m["confusion"] for p, m in again.items()} == {p: m["confusion"] for p, m in result["parts"].items()}
    write_manifest(corpus.filter(corpus.table["speaker"] != "ann"), corpus.root / "growing.csv")
    with pytest.raises(ValueError, match=r"the corpus has changed since: .* files of the .* part"):
        evaluate_run(tmp_path / "run", device="cpu", quiet=True)


def test_loaded_classifier_is_self_contained(experiment: Experiment, tmp_path: Path) -> None:
    train_classifier(experiment, tmp_path / "run", quiet=True)
    os.rename(tmp_path / "run/model.safetensors", tmp_path / "alone.safetensors")
    classifier = load_classifier(load_checkpoint(tmp_path / "alone.safetensors", "classifier"))
    assert classifier.embedding_scale != 1
    assert classifier(torch.rand(1, 1, 512, 128)).shape == (1, 3)
