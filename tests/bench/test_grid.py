"""The hours of the paper's grid, counted training by training."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from bench import grid
from bench.case import FORWARD
from bench.network import CACHED, NO_AT, STEPS, TRAIN
from tests.bench.measurements import row

# Files of the training and of the validation part.
PARTS = {
    ("iemocap", "random"): (3143, 898), ("ravdess", "random"): (1008, 288), ("tess", "random"): (1960, 560),
    ("iemocap", "actor"): (2694, 898), ("ravdess", "actor"): (1080, 303), ("tess", "actor"): (1400, 700),
}  # fmt: skip
STEP = {0: 1.0, 2: 2.0, 7: 7.0, 13: 19.0}


def times(forward: Any) -> Any:
    return {layer: grid.Seconds(step, forward * step) for layer, step in STEP.items()}


def interpolated(layer: Any) -> Any:
    if layer <= 2:
        return STEP[2]
    low, high = (2, 7) if layer <= 7 else (7, 13)
    return STEP[low] + (STEP[high] - STEP[low]) * (layer - low) / (high - low)


@pytest.mark.parametrize("forward", [0.0, 0.25])
def test_hours_are_counted_training_by_training(forward: float) -> None:
    trainings, seconds = 0, 0.0
    for part, network in itertools.product(PARTS, ("quaternion", "real")):
        of_network = [STEP[0]]
        for _kind, layer in itertools.product(("speaker", "word", "speaker, word", "word, speaker"), range(1, 14)):
            of_network.append(interpolated(layer))
        trainings += len(of_network)
        steps, passes = (len(range(0, samples, 20)) for samples in PARTS[part])
        if network == "real":
            seconds += sum(steps * one + passes * forward * one for one in of_network)
    assert trainings == len(grid.emotion_trainings()) == 636
    assert len(grid.trainings()) == 642
    assert grid.epoch_seconds("real", times(forward)) == pytest.approx(seconds)


def rows_of(way: Any, network: str = "quaternion") -> Any:
    """Steps of as many seconds as in `STEP`, forward passes of a quarter."""
    rows = []
    for at, seconds in STEP.items():
        layer, variant = (f"AT at layer {at}", way.variant) if at else (NO_AT, "")
        for work, part in ((TRAIN, 1.0), (FORWARD, 0.25)):
            names = {"layer": layer, "variant": variant, "work": work, "mode": way.mode, "provider": way.provider}
            rows.append(row(1e6 * part * seconds, suite="step", network=network, **names))
    return rows


@pytest.mark.parametrize("way", grid.WAYS)
def test_times_are_of_the_way_that_is_asked_for(way: Any) -> None:
    found = rows_of(way)
    slower = [replace(one, median_us=9e9, **wrong) for one in found
              for wrong in ({"batch": 256}, {"precision": "float32"}, {"network": "real"}, {"variant": "other"},
                            {"provider": "x"}, {"mode": "none"}, {"work": "forward+backward"})]  # fmt: skip
    assert grid.measured(slower + found + slower, "quaternion", way) == times(0.25)
    assert grid.measured(found, "real", way) is None
    for one in found:
        rest = [other for other in found if other is not one]
        assert grid.measured(rest, "quaternion", way) is None
        assert grid.measured([*rest, replace(one, status="failed")], "quaternion", way) is None


def test_what_it_needs_is_measured_by_the_suite() -> None:
    """But for the providers, which tests of the suite are about."""
    known = {(c.network, c.layer, c.variant, c.batch, c.precision, c.work) for c in STEPS.cases}
    for network, variant in itertools.product(grid.NETWORKS, ("", CACHED)):
        needed = rows_of(grid.Way("ours", variant, "graph"), network)
        assert {(r.network, r.layer, r.variant, r.batch, r.precision, r.work) for r in needed} <= known
    assert all(set(grid.WAYS[n].mode for n in range(3)) <= set(c.modes) for c in STEPS.cases)
