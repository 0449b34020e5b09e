"""Intervals, paired differences and spreads against enumeration and first principles."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import norm, t

from qat.results.statistics import (
    cluster_interval,
    deviation,
    false_discovery,
    over_seeds,
    paired_difference,
)


def clips(rng: np.random.Generator, speakers: int, sizes: tuple[int, int] = (5, 40)) -> tuple[np.ndarray, list[str]]:
    """Right or wrong answers of speakers of different difficulty and number of clips."""
    counts = rng.integers(*sizes, speakers)
    values = np.concatenate([rng.random(n) < rng.uniform(0.2, 0.8) for n in counts]).astype(float)
    return values, [f"speaker {s}" for s, n in enumerate(counts) for _ in range(n)]


def resampled_means(values: np.ndarray, clusters: list[str]) -> np.ndarray:
    """The mean of every possible draw of clusters, all equally likely."""
    groups = [values[np.asarray(clusters) == name] for name in sorted(set(clusters))]
    return np.array([np.concatenate(draw).mean() for draw in product(groups, repeat=len(groups))])


def test_the_interval_cuts_the_expanded_tails_of_all_draws_of_speakers(rng: np.random.Generator) -> None:
    values, clusters = clips(rng, speakers=5)
    tail = norm.cdf(-np.sqrt(5 / 4) * t.ppf(0.95, 4))
    low, high = cluster_interval(values, clusters, level=0.9, draws=200_000)
    means = resampled_means(values, clusters)
    # Draws of 3125 kinds: the share below an end is within one kind's multiplicity of the tail.
    assert (means < low - 1e-9).mean() <= tail * 1.25 + 0.001
    assert (means <= low + 1e-9).mean() >= tail * 0.75 - 0.001
    assert (means > high + 1e-9).mean() <= tail * 1.25 + 0.001
    assert (means >= high - 1e-9).mean() >= tail * 0.75 - 0.001


def test_two_speakers_give_their_own_means(rng: np.random.Generator) -> None:
    values, clusters = clips(rng, speakers=2)
    means = resampled_means(values, clusters)
    assert cluster_interval(values, clusters) == pytest.approx((means.min(), means.max()))


def test_more_clips_of_the_same_speakers_teach_nothing(rng: np.random.Generator) -> None:
    values, clusters = clips(rng, speakers=7)
    once = cluster_interval(values, clusters)
    assert cluster_interval(np.tile(values, 5), clusters * 5) == pytest.approx(tuple(once))
    as_if_independent = cluster_interval(np.tile(values, 5), list(range(5 * len(values))))
    assert as_if_independent.high - as_if_independent.low < once.high - once.low


def test_the_order_of_clips_does_not_matter(rng: np.random.Generator) -> None:
    values, clusters = clips(rng, speakers=6)
    order = rng.permutation(len(values))
    assert cluster_interval(values[order], [clusters[n] for n in order]) == cluster_interval(values, clusters)


def test_a_wider_level_gives_a_wider_interval(rng: np.random.Generator) -> None:
    values, clusters = clips(rng, speakers=8)
    narrow, wide = (cluster_interval(values, clusters, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < values.mean() < narrow.high < wide.high


def test_no_interval_from_one_speaker_or_without_spread(rng: np.random.Generator) -> None:
    values, _ = clips(rng, speakers=3)
    assert cluster_interval(values, ["one"] * len(values)) is None
    assert cluster_interval(np.ones(9), list("aaabbbccc")) is None
    assert cluster_interval([], []) is None


def test_a_paired_difference_is_first_minus_second_and_forgets_what_both_share(rng: np.random.Generator) -> None:
    speakers, each = 8, 50
    clusters = [f"s{s}" for s in range(speakers) for _ in range(each)]
    hard = np.repeat(np.linspace(0.1, 0.7, speakers), each)
    draw = rng.random(speakers * each)
    first, second = draw < hard + 0.15, draw < hard
    mean, interval, _ = paired_difference(first, second, clusters)
    assert mean == pytest.approx(first.mean() - second.mean())
    assert mean > 0
    assert interval == pytest.approx(tuple(cluster_interval(first.astype(float) - second, clusters)))
    alone = cluster_interval(first, clusters)
    assert interval.high - interval.low < (alone.high - alone.low) / 2
    back = paired_difference(second, first, clusters)
    assert back.mean == pytest.approx(-mean)
    assert back.interval == pytest.approx((-interval.high, -interval.low), abs=0.01)


def test_deviation_over_seeds(rng: np.random.Generator) -> None:
    values = rng.random(4).tolist()
    mean = sum(values) / 4
    assert deviation(values) == pytest.approx((sum((v - mean) ** 2 for v in values) / 3) ** 0.5)
    assert deviation(values[:1]) is deviation([]) is None


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="there are 2 clusters"):
        cluster_interval([1, 0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="level is 95; it must be between 0 and 1"):
        cluster_interval([1, 0], ["a", "b"], level=95)
    with pytest.raises(ValueError, match="the same clips in both"):
        paired_difference([1, 0], [1], ["a", "b"])


def test_differences_over_seeds_have_students_interval_and_p_value(rng: np.random.Generator) -> None:
    first, second = rng.random(5), rng.random(5)
    d = first - second
    found = over_seeds(first.tolist(), second.tolist())
    error = d.std(ddof=1) / 5**0.5
    t = 2.7764451  # of a two-sided 5 % with 4 degrees of freedom, from a table
    assert found.mean == pytest.approx(d.mean())
    assert found.interval == pytest.approx((d.mean() - t * error, d.mean() + t * error))
    assert (found.p < 0.05) == (abs(d.mean()) > t * error)
    assert (found.rose, found.fell) == (sum(d > 0), sum(d < 0))
    back = over_seeds(second.tolist(), first.tolist())
    assert (back.mean, back.p) == pytest.approx((-found.mean, found.p))
    assert back.rose == found.fell


def test_one_seed_and_equal_differences_have_no_interval() -> None:
    assert over_seeds([0.5], [0.4])[1:] == (None, None, 1, 0)
    assert over_seeds([0.5, 0.6], [0.4, 0.5])[1:] == (None, None, 2, 0)
    assert over_seeds([0.5, 0.5], [0.5, 0.5]) == (0, None, None, 0, 0)
    with pytest.raises(ValueError, match="first has 1 seeds, second 2"):
        over_seeds([0.5], [0.4, 0.5])


def test_false_discovery_is_benjamini_and_hochbergs(rng: np.random.Generator) -> None:
    p = rng.random(12)
    ranked = sorted(p)
    by_hand = [min(min(12 * ranked[k] / (k + 1), 1) for k in range(ranked.index(value), 12)) for value in p]
    assert false_discovery(p.tolist()) == pytest.approx(by_hand)


@pytest.mark.slow
def test_nine_speakers_cover_what_the_docstring_says(rng: np.random.Generator) -> None:
    repeats, hits = 4000, 0
    for _ in range(repeats):
        chance = np.clip(rng.normal(0.5, 0.12, (9, 1)), 0, 1)
        values = (rng.random((9, 96)) < chance).ravel()
        interval = cluster_interval(values, np.repeat(np.arange(9), 96).tolist(), draws=1000)
        hits += interval is not None and interval.low <= 0.5 <= interval.high
    assert 0.925 < hits / repeats < 0.96
