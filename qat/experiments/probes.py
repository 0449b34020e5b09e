"""What a trained emotion network knows beside emotion: linear probes for voice, and how often it takes the shortcut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from qat.config import Experiment, from_plain
from qat.files import write_json
from qat.models import tap_name
from qat.training.checkpoint import load_checkpoint
from qat.training.data import load_data
from qat.training.pipeline import load_classifier


def analyse(run: Path) -> dict[str, float]:
    """Probe a finished run; ``analysis.json`` in its folder keeps the result.

    Returns:
        ``voice_probe``: accuracy of a linear classifier of the voice from the features at the anti-transfer layer,
        trained on three quarters of the training voices' texts and tested on the others; ``voice_probe_chance``.
        After a confounded split also ``shortcut_rate``: share of the withheld clips (training voices in emotions that
        are not their own) which are answered with the voice's own emotion.
    """
    path = run / "analysis.json"
    if path.is_file():
        result: dict[str, float] = json.loads(path.read_text())
        return result
    checkpoint = load_checkpoint(run, "classifier")
    experiment = from_plain(Experiment, checkpoint.record["experiment"])
    predictions = pd.read_csv(run / "predictions.csv")
    data = load_data(experiment, checkpoint.record["normalisation"]["kind"], trained=checkpoint, quiet=True)
    classifier = load_classifier(checkpoint).eval()
    config = experiment.anti_transfer
    tap = tap_name(config.layers[-1], config.position)
    rows = sorted(data.parts["train"] + data.parts.get("withheld", []))
    features = []
    with torch.no_grad():
        for indices in torch.tensor(rows).split(64):
            x = classifier.embed(data.spectrograms(indices, None))
            features.append(classifier.net.features_at(x, [tap])[tap].flatten(1))
    voices = data.index["speaker"].to_numpy()[rows]
    result = {
        "voice_probe": linear_probe(torch.cat(features).numpy(), voices, data.index["text"].to_numpy()[rows]),
        "voice_probe_chance": 1 / len(set(voices)),
    }
    if "withheld" in data.parts:
        result["shortcut_rate"] = shortcut_rate(predictions)
    write_json(path, result)
    return result


def shortcut_rate(predictions: pd.DataFrame) -> float:
    """Share of ``withheld`` predictions that are the voice's own emotion, the one it says most in ``train``.

    Args:
        predictions: a run's ``predictions.csv``: columns ``part``, ``speaker``, ``label``, ``predicted``.
    """
    train, withheld = (predictions[predictions["part"] == part] for part in ("train", "withheld"))
    own = train.groupby("speaker")["label"].agg(lambda labels: labels.mode().iloc[0])
    return float((withheld["predicted"] == withheld["speaker"].map(own)).mean())


def linear_probe(features: NDArray[np.float32], labels: NDArray[np.object_], texts: NDArray[np.object_]) -> float:
    """Accuracy of logistic regression on texts that it was not fitted on: every fourth text, in sorted order.

    Args:
        features: `[n, d]`.
        labels: `[n]`, what is probed for.
        texts: `[n]`, what is said in each clip.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    held_out = np.isin(texts, np.unique(texts)[::4])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    with threadpool_limits(1):  # one thread was six times faster than two, with two probes on two cores
        probe.fit(features[~held_out], labels[~held_out])
    return float(probe.score(features[held_out], labels[held_out]))
