"""Time of the emotion trainings of the paper's grid, from measured steps.

The trainings, and the sizes of their training and validation parts, are those that `qat grid` plans and estimates.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.case import FORWARD
from bench.network import CACHED, NO_AT, TRAIN
from bench.results import Row
from bench.summary import RESEARCH, median
from qat.campaign.cost import samples
from qat.campaign.grid import plan_grid
from qat.config import AnyExperiment, Experiment
from qat.config.preset import VALUES

NETWORKS = ("quaternion", "real")
LAYERS = len(VALUES["layer"][1:])
BATCH, PRECISION = 20, "bf16"
MEASURED = (2, 7, 13)  # layers


class Way(NamedTuple):
    """Provider, variant and mode of the steps."""

    provider: str
    variant: str
    mode: str


class Seconds(NamedTuple):
    """Time of a step, and of the forward pass of a batch in validation."""

    step: float
    forward: float


SHARED = Way("ours", CACHED, "graph")  # measured by bench/sharing.py: targets are computed before an epoch
WAYS = (Way("ours", "", "graph"), SHARED, Way(RESEARCH, "", "eager"))


@cache
def trainings() -> list[AnyExperiment]:
    """All trainings of the paper's grid."""
    return list(plan_grid(Path()).trainings.values())


def emotion_trainings() -> list[Experiment]:
    return [each for each in trainings() if isinstance(each, Experiment) and each.task == "emotion"]


def measured(rows: Sequence[Row], network: str, way: Way) -> dict[int, Seconds] | None:
    """Times by layer, 0 without anti-transfer; None if one was not measured."""
    times = {row.key: 1e-6 * us for row in rows if (us := median(row))}
    by_layer = {}
    for at in (0, *MEASURED):
        layer, variant = (f"AT at layer {at}", way.variant) if at else (NO_AT, "")
        case = ("step", network, layer, variant, BATCH, PRECISION)
        step, forward = (times.get((*case, work, way.mode, way.provider)) for work in (TRAIN, FORWARD))
        if step is None or forward is None:
            return None
        by_layer[at] = Seconds(step, forward)
    return by_layer


def epoch_seconds(network: str, times: Mapping[int, Seconds]) -> float:
    """Seconds of one epoch of all emotion trainings of one network.

    Layers between the measured ones are interpolated linearly; those before the first are taken as the first.
    """
    seconds = 0.0
    for training in emotion_trainings():
        if training.network.domain == network:
            steps, passes = (math.ceil(size / BATCH) for size in samples(training))
            none, *tapped = (steps * times[layer].step + passes * times[layer].forward for layer in (0, *MEASURED))
            at = training.anti_transfer
            seconds += none if at.twin is None else float(np.interp(at.layers[0], MEASURED, tapped))
    return seconds
