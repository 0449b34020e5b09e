"""What trainings that have not been run yet are likely to cost: arithmetic, at a rate that is assumed or was measured.

    seconds of an epoch = (training samples x FLOP to train one + validation samples x FLOP to judge one) / rate

A sample is trained by three forward passes' worth of arithmetic (forward, and twice that backward). Counted are the
products of convolutions and linear maps, as the definition has them, and the twin's forward pass; Gram matrices,
spectrograms, reading and judging the test part are not.
"""

from __future__ import annotations

import pandas as pd

from qat.campaign.options import Assumed
from qat.campaign.plan import RUNS, Campaign
from qat.config import AnyExperiment, Experiment, NetworkConfig, RHEmoExperiment, TrainingConfig
from qat.data.corpora import CORPORA, FOUR_EMOTIONS
from qat.data.splits import counts
from qat.models.rhemo import DIMENSIONS
from qat.models.sizes import layer_sizes
from qat.models.vgg import HIDDEN, scaled
from qat.results.record import Result, read_result

_WORDS = {"librispeech": (120_000, 40_000), "demo": counts(864)[:2]}  # training (at most) and validation
_ACTOR = {"iemocap": (0.6, 0.2), "tess": (0.5, 0.25), "ravdess": (0.75, 0.21)}  # training and validation
_RHEMO_CONVOLUTIONS = 16e6  # multiplications of encoder and decoder, a sample


def estimate(campaign: Campaign, assumed: Assumed) -> pd.DataFrame:
    """What is left to train, by stage and network.

    Args:
        campaign: the trainings.
        assumed: epochs and rate where no training of the same stage and network is finished. Where some are, their mean
            number of epochs and the arithmetic that they did in a second are taken.

    Returns:
        One row per stage and network: ``stage``, ``network``, ``trainings``, ``finished``, ``epochs`` (mean of those
        that are left), ``tflops``, ``hours`` (of those that are left, one after another on one device) and ``basis``:
        where epochs and rate come from.
    """
    finished, rows = campaign.finished(), []
    for (stage, network), group in campaign.table.fillna("").groupby(["stage", "network"], sort=False):
        runs = {RUNS / run: campaign.trainings[RUNS / run] for run in group["run"]}
        results = {path: read_result(campaign.folder / path / "result.json") for path in runs if path in finished}
        measured = _measured([(runs[path], result) for path, result in results.items()])
        epochs, rate, basis = measured or (assumed.epochs, assumed.tflops, "assumed")
        remaining = [experiment for path, experiment in runs.items() if path not in results]
        lengths = [_length(experiment.training, epochs) for experiment in remaining]
        flop = sum(length * flop_of_epoch(one) for length, one in zip(lengths, remaining, strict=True))
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
    """Operations of one epoch of a training, two for each multiplication with its addition."""
    train, validation = _samples(experiment)
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
    """Operations of a sample's forward pass through the first layers."""
    return sum(layer.flops for layer in layer_sizes(network, 1)[:layers])


def _samples(experiment: AnyExperiment) -> tuple[float, float]:
    """Training and validation samples, one cut a file."""
    name, where = experiment.corpus.name, experiment.corpus.where
    if isinstance(experiment, Experiment) and experiment.task == "word":
        return _WORDS.get(name, _WORDS["librispeech"])
    items = (CORPORA[name].utterances if name in CORPORA else 0) or CORPORA["iemocap"].utterances
    if name == "iemocap" and "emotion" in where:
        items = FOUR_EMOTIONS
    if name == "demo" and "speaker" in where:
        items = items * len(where["speaker"]) // 18
    if experiment.split.rule != "random" and name in _ACTOR:
        train, validation = (share * items for share in _ACTOR[name])
        return train, validation
    return counts(items)[:2]


def _measured(runs: list[tuple[AnyExperiment, Result]]) -> tuple[int, float, str] | None:
    """Mean epochs and rate of finished runs, and where they come from."""
    timed = [(result, result.epochs * flop_of_epoch(one)) for one, result in runs if result.epochs and result.seconds]
    if not timed:
        return None
    devices = ", ".join(sorted({result.device for result, _ in timed}))
    epochs, seconds = (sum(getattr(result, name) for result, _ in timed) for name in ("epochs", "seconds"))
    rate = sum(flop for _, flop in timed) / seconds / 1e12
    return round(epochs / len(timed)), rate, f"measured in {len(timed)} of them on {devices}"


def _length(training: TrainingConfig, epochs: int) -> int:
    """Epochs of a training: none stops before its patience is over."""
    return min(max(epochs, training.patience + 1), training.epochs)
