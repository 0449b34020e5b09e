"""The estimated time of trainings that have not been run yet: their arithmetic at an assumed or measured rate.

    seconds of an epoch = (training samples x FLOP to train one + validation samples x FLOP to judge one) / rate

Training on a sample takes three times the arithmetic of its forward pass (the backward pass takes twice as much as
forward). The products of convolutions and linear layers are counted, as defined, and the twin's forward pass; Gram
matrices, spectrograms, reading of files and the test part are not.
"""

from __future__ import annotations

import pandas as pd

from qat.campaign.options import Assumed
from qat.campaign.plan import RUNS, Campaign
from qat.config import AnyExperiment, CorpusConfig, Experiment, NetworkConfig, RHEmoExperiment, TrainingConfig
from qat.data.corpora import CORPORA, FOUR_EMOTIONS
from qat.data.splits import counts
from qat.models.rhemo import DIMENSIONS
from qat.models.sizes import layer_sizes
from qat.models.vgg import HIDDEN, scaled
from qat.results.record import Result, read_result

# Sizes of the training part (maximum) and the validation part of the word task.
_WORDS = {"librispeech": (120_000, 40_000), "demo": counts(864)[:2]}
# Shares of training and validation part in the actor split.
_ACTOR = {"iemocap": (0.6, 0.2), "tess": (0.5, 0.25), "ravdess": (0.75, 0.21)}
_RHEMO_CONVOLUTIONS = 16e6  # multiplications in encoder and decoder, per sample


def estimate(campaign: Campaign, assumed: Assumed) -> pd.DataFrame:
    """Estimated time of the trainings that are not finished, by stage and network.

    Args:
        campaign: trainings.
        assumed: epochs and rate of a stage and network without finished trainings. Where some are finished, their mean
            number of epochs and their measured rate are used instead.

    Returns:
        One row per stage and network: ``stage``, ``network``, ``trainings``, ``finished``, ``epochs`` (mean over
        the unfinished ones), ``tflops``, ``hours`` (of the unfinished ones, one after another on one device) and
        ``basis``: the origin of epochs and rate.
    """
    finished, rows = campaign.finished(), []
    for (stage, network), group in campaign.table.fillna("").groupby(["stage", "network"], sort=False):
        runs = {RUNS / run: campaign.trainings[RUNS / run] for run in group["run"]}
        results = {path: read_result(campaign.folder / path / "result.json") for path in runs if path in finished}
        measured = _measured([(runs[path], result) for path, result in results.items()])
        epochs, rate, basis = measured or (assumed.epochs, assumed.tflops, "assumed")
        remaining = [experiment for path, experiment in runs.items() if path not in results]
        lengths = [_length(experiment.training, epochs) for experiment in remaining]
        flop = sum(length * flop_of_epoch(left) for length, left in zip(lengths, remaining, strict=True))
        rows.append(
            {
                "stage": stage,
                "network": network,
                "trainings": len(runs),
                "finished": len(results),
                "epochs": sum(lengths) / len(lengths) if lengths else 0.0,
                "tflops": rate,
                "hours": flop / (rate * 1e12) / 3600,
                "basis": basis,
            }
        )
    return pd.DataFrame(rows)


def flop_of_epoch(experiment: AnyExperiment) -> float:
    """Operations in one epoch of a training; a multiplication and an addition count as two."""
    train, validation = samples(experiment)
    forward = _forward(experiment)
    twin = 0.0
    if isinstance(experiment, Experiment) and (experiment.anti_transfer.twin or experiment.anti_transfer.random_twin):
        at, network = experiment.anti_transfer, experiment.network
        fixed = not network.embeds or network.rhemo_mode == "frozen"
        if not (at.cache and fixed):
            deepest = 13 if at.position == "pool5" else max(at.layers)
            twin = _vgg(network, deepest)
    return train * (3 * forward + twin) + validation * (forward + twin)


def _forward(experiment: AnyExperiment) -> float:
    if isinstance(experiment, RHEmoExperiment):
        hidden, pixels = scaled(HIDDEN, experiment.rhemo.width), 64 * 64
        heads = (1 + len(DIMENSIONS)) * (pixels * hidden + hidden * hidden)
        return 2 * (_RHEMO_CONVOLUTIONS + heads)
    return _vgg(experiment.network, 15)


def _vgg(network: NetworkConfig, layers: int) -> float:
    """Operations in the forward pass of one sample through the first ``layers`` layers."""
    return sum(layer.flops for layer in layer_sizes(network, 1)[:layers])


def samples(experiment: AnyExperiment) -> tuple[float, float]:
    """Estimated number of training and validation samples, one cut per file."""
    name = experiment.corpus.name
    if isinstance(experiment, Experiment) and experiment.task == "word":
        return _WORDS.get(name, _WORDS["librispeech"])
    files = utterances(experiment.corpus)
    if experiment.split.rule != "random" and name in _ACTOR:
        train, validation = (share * files for share in _ACTOR[name])
        return train, validation
    return counts(files)[:2]


def utterances(corpus: CorpusConfig) -> int:
    """Number of selected utterances of a corpus; of an unknown one, as many as IEMOCAP has."""
    if corpus.name == "iemocap" and "emotion" in corpus.where:
        return FOUR_EMOTIONS
    files = (CORPORA[corpus.name].utterances if corpus.name in CORPORA else 0) or CORPORA["iemocap"].utterances
    return files * len(corpus.where["speaker"]) // 18 if corpus.name == "demo" and "speaker" in corpus.where else files


def _measured(runs: list[tuple[AnyExperiment, Result]]) -> tuple[int, float, str] | None:
    """Mean number of epochs and rate of finished runs, and a description of their origin."""
    timed = [(result, result.epochs * flop_of_epoch(run)) for run, result in runs if result.epochs and result.seconds]
    if not timed:
        return None
    devices = ", ".join(sorted({result.device for result, _ in timed}))
    epochs, seconds = (sum(getattr(result, name) for result, _ in timed) for name in ("epochs", "seconds"))
    rate = sum(flop for _, flop in timed) / seconds / 1e12
    return round(epochs / len(timed)), rate, f"measured in {len(timed)} of them on {devices}"


def _length(training: TrainingConfig, epochs: int) -> int:
    """Number of epochs of a training; early stopping cannot end it before its patience is over."""
    return min(max(epochs, training.patience + 1), training.epochs)
