"""Linear probes of a trained emotion network for speakers and texts, and its shortcut rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from qat.config import to_plain
from qat.files import write_json
from qat.models import tap_name
from qat.results.record import Analysis, Probes, read_analysis
from qat.results.runs import read_csv
from qat.training.checkpoint import load_checkpoint
from qat.training.data import load_data
from qat.training.embeddings import stored_embeddings
from qat.training.inference import load_classifier


def analyse(run: Path) -> Analysis:
    """Probe a finished run and keep the result in its ``analysis.json``.

    Returns:
        ``voice_probe``: accuracy of a linear classifier of the speaker from the features at the anti-transfer layer,
        trained on three quarters of the training speakers' texts and tested on the others; ``word_probe``: the same for
        the text, trained on three quarters of the speakers. With several layers these are of the last layer; ``layers``
        has both by layer. ``voice_probe_chance`` and ``word_probe_chance``: accuracy of guessing. ``shortcut_rate``,
        only after a confounded split: share of the withheld clips (training speakers in emotions that are not their
        own) that are classified as the speaker's own emotion.
    """
    path = run / "analysis.json"
    if path.is_file():
        return read_analysis(path)
    checkpoint = load_checkpoint(run, "classifier")
    experiment = checkpoint.experiment
    predictions = read_csv(run / "predictions.csv", dtype=str, keep_default_na=False)
    if predictions is None or not {"part", "speaker", "label", "predicted"} <= set(predictions.columns):
        raise ValueError(f"{run / 'predictions.csv'}: must have the columns part, speaker, label and predicted")
    data = load_data(experiment, trained=checkpoint, quiet=True)
    classifier = load_classifier(checkpoint).eval()
    stored = stored_embeddings(classifier, data.spectrograms, experiment.cache, torch.device("cpu"), quiet=True)
    config = experiment.anti_transfer
    taps = {layer: tap_name(layer, config.position) for layer in config.layers}
    rows = sorted(data.parts["train"] + data.parts.get("withheld", []))
    features: dict[int, list[NDArray[np.float32]]] = {layer: [] for layer in taps}
    with torch.no_grad():
        for indices in torch.tensor(rows).split(64):
            if stored:
                x = stored(indices) / classifier.embedding_scale
            else:
                x = classifier.embed(data.spectrograms(indices, None))
            tapped = classifier.net.features_at(x, list(taps.values()))
            for layer, tap in taps.items():
                features[layer].append(tapped[tap].flatten(1).numpy())
    speakers, texts = (data.index[column].to_numpy()[rows] for column in ("speaker", "text"))
    layers = {}
    for layer in taps:
        matrix = np.concatenate(features.pop(layer))
        layers[layer] = Probes(
            linear_probe(matrix, speakers, held_out=texts), linear_probe(matrix, texts, held_out=speakers)
        )
    last = layers[config.layers[-1]]
    shortcut = shortcut_rate(predictions) if "withheld" in data.parts else None
    chances = 1 / len(set(speakers)), 1 / len(set(texts))
    analysis = Analysis(last.voice_probe, last.word_probe, *chances, shortcut, layers)
    write_json(path, to_plain(analysis))
    return analysis


def shortcut_rate(predictions: pd.DataFrame) -> float:
    """Share of ``withheld`` predictions that are the speaker's own emotion, its most frequent one in ``train``.

    Args:
        predictions: a run's ``predictions.csv``: columns ``part``, ``speaker``, ``label``, ``predicted``.
    """
    train, withheld = (predictions[predictions["part"] == part] for part in ("train", "withheld"))
    own = train.groupby("speaker")["label"].agg(lambda labels: labels.mode().iloc[0])
    return float((withheld["predicted"] == withheld["speaker"].map(own)).mean())


def linear_probe(features: NDArray[np.float32], labels: NDArray[np.object_], held_out: NDArray[np.object_]) -> float:
    """Accuracy of logistic regression on clips of held-out groups.

    Args:
        features: features `[n, d]`; they are standardised.
        labels: labels to predict `[n]`.
        held_out: group of each clip `[n]`, such as its text; every fourth group, in sorted order, is tested.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    tested = np.isin(held_out, np.unique(held_out)[::4])
    scaler = StandardScaler().fit(features[~tested])
    fitted, judged = scaler.transform(features[~tested]), scaler.transform(features[tested])
    probe = LogisticRegression(C=0.1, max_iter=300)
    with threadpool_limits(1):  # two simultaneous probes on two cores were six times faster with one thread each
        if len(fitted) < fitted.shape[1]:
            # With an L2 penalty the weights lie in the span of the n clips, so n coordinates give the same classifier.
            squares, axes = np.linalg.eigh((fitted @ fitted.T).astype(np.float64))
            spanned = squares > 1e-6 * squares[-1]
            axes = axes[:, spanned] / np.sqrt(squares[spanned])
            fitted, judged = (matrix @ fitted.T @ axes for matrix in (fitted, judged))
        probe.fit(fitted, labels[~tested])
    return float(probe.score(judged, labels[tested]))
