"""How long the trainings of the paper's grid take, from measured steps.

For each of two networks and two splits of three corpora: one training without anti-transfer and one for each of 13
layers and 4 kinds of it (two single; two dual, whose first half is a single one), 636 in all.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bench.case import FORWARD
from bench.network import CACHED, NO_AT, TRAIN
from bench.results import Row
from bench.summary import RESEARCH, median
from qat.data import corpora
from qat.data.splits import counts
from qat.models.vgg import CHANNELS

NETWORKS = ("quaternion", "real")
CORPORA = {"IEMOCAP": corpora.FOUR_EMOTIONS} | {
    name: corpora.CORPORA[name.lower()].utterances for name in ("RAVDESS", "TESS")
}
SPLITS, KINDS, LAYERS = 2, 4, len(CHANNELS)
TRAININGS = len(NETWORKS) * len(CORPORA) * SPLITS * (1 + KINDS * LAYERS)
OTHERS = 6  # four networks of the orthogonal tasks, two stages of RH-Emo
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


SHARED = Way("ours", CACHED, "graph")  # what bench/sharing.py measures: an epoch's targets are computed before it
WAYS = (Way("ours", "", "graph"), SHARED, Way(RESEARCH, "", "eager"))


def measured(rows: Sequence[Row], network: str, way: Way) -> dict[int, Seconds] | None:
    """Times by layer, 0 without anti-transfer; None where one was not measured."""
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


def epoch_seconds(times: Mapping[int, Seconds]) -> float:
    """Seconds of one epoch of all trainings of one network.

    Layers between the measured ones are interpolated linearly; those before the first are taken as the first.
    """
    parts = zip(*map(counts, CORPORA.values()), strict=True)
    steps, passes, _ = (sum(math.ceil(size / BATCH) for size in sizes) for sizes in parts)
    none, *tapped = (steps * times[layer].step + passes * times[layer].forward for layer in (0, *MEASURED))
    layers = np.interp(range(1, LAYERS + 1), MEASURED, tapped)
    return float(SPLITS * (none + KINDS * layers.sum()))
