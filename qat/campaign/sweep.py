"""Sweeps: one training for every combination of the varied settings in a plan file."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.campaign.plan import Campaign
from qat.config import Experiment, flatten, from_plain, prefix_errors, to_plain, typed_setting
from qat.files import read_yaml
from qkernels.losses import Loss

SEED = "training.seed"


def plan_sweep(folder: Path, file: Path, seeds: Sequence[int] | None = None) -> Campaign:
    """Every training of a plan file, named after its varied settings; runs that differ only in their seed share a name.

    Args:
        folder: folder of the campaign.
        file: plan, see :class:`Sweep`.
        seeds: values of ``training.seed``, instead of the file's.

    Raises:
        ValueError: the file is not a plan, a training has a wrong or unknown setting, or two trainings are equal.
    """
    campaign = Campaign(folder)
    names: dict[Path, str] = {}
    for name, experiment in read_plan(file, seeds):
        stage = "word" if experiment.task == "word-presence" else experiment.task
        with prefix_errors(file, name):
            run = campaign.add(
                experiment,
                name,
                stage=stage,
                network=experiment.network.domain,
                corpus=experiment.corpus.name,
                seed=experiment.training.seed,
            )
            if run in names:
                raise ValueError(f"is the same training as {names[run]}; varied settings must change what is learnt")
        names[run] = name
    return campaign


@dataclass(frozen=True)
class Sweep:
    """The content of a plan file. Runs are all combinations of the varied values; the first setting varies slowest.

    Args:
        base: settings of every run, as in a file for ``qat train --config``.
        vary: list of values for each varied setting, by its dotted name.
    """

    base: dict[str, Any] = field(default_factory=dict)
    vary: dict[str, list[Any]] = field(default_factory=dict)


def read_plan(file: Path, seeds: Sequence[int] | None = None) -> list[tuple[str, Experiment]]:
    """Name and experiment of every training of a plan file, see :class:`Sweep`.

    Args and errors: see :func:`plan_sweep`.
    """
    plain = read_yaml(file)
    with prefix_errors(file):
        plan = from_plain(Sweep, plain)
    vary = plan.vary | ({SEED: list(seeds)} if seeds is not None else {})
    with prefix_errors(file, "base"):
        for setting, value in flatten(plan.base).items():
            typed_setting(Experiment, setting, value)
    values: dict[str, list[Any]] = {}
    for setting, listed in vary.items():
        with prefix_errors(file, "vary"):
            values[setting] = [typed_setting(Experiment, setting, value) for value in listed]
            if not listed or any(value in values[setting][:n] for n, value in enumerate(values[setting])):
                raise ValueError(f"{setting}: {listed!r} must be a list of one or more values, each once")
    names = _names({setting: listed for setting, listed in values.items() if setting != SEED})
    trainings = []
    for numbers in itertools.product(*(range(len(listed)) for listed in values.values())):
        choice = dict(zip(values, numbers, strict=True))
        settings = {group: dict(value) if isinstance(value, dict) else value for group, value in plan.base.items()}
        for setting, n in choice.items():
            group, _, name = setting.partition(".")
            if name:
                settings.setdefault(group, {})[name] = to_plain(values[setting][n])
            else:
                settings[group] = values[setting][n]
        where = ", ".join(f"{setting} {vary[setting][n]!r}" for setting, n in choice.items()) or "base"
        with prefix_errors(file, where):
            experiment = from_plain(Experiment, settings)
        name = ",".join(names[setting][n] for setting, n in choice.items() if setting != SEED)
        trainings.append((name or "base", experiment))
    return trainings


def _names(values: dict[str, list[Any]]) -> dict[str, list[str]]:
    """Names of the values of each setting, such as ``layers-2``."""
    last = Counter(setting.rpartition(".")[2] for setting in values)
    names = {}
    for setting, listed in values.items():
        group, _, label = setting.rpartition(".")
        if last[label] > 1 or label == "seed":
            # In a run's name, reports read "seed" and a number as the training's seed.
            label = group if label == "seed" else setting
        slugs = [_slug(value) for value in listed]
        if len(set(slugs)) < len(slugs) or not all(
            0 < len(slug) <= 32 and "seed" not in slug.lower() for slug in slugs
        ):
            slugs = [str(n) for n in range(1, len(slugs) + 1)]
        names[setting] = [f"{label}-{slug}" for slug in slugs]
    return names


def _slug(value: Any) -> str:
    """
    >>> _slug([2, 13]), _slug(0.5), _slug(Path("runs/speaker")), _slug({"speaker": ["ann", "ben"]})
    ('2+13', '0.5', 'speaker', 'speaker-ann+ben')
    """
    if isinstance(value, Loss):
        plain = value.plain()
        value = list(plain.values()) if isinstance(plain, dict) else plain
    if isinstance(value, list):
        return "+".join(map(_slug, value))
    if isinstance(value, dict):
        return "+".join(f"{key}-{_slug(inner)}" for key, inner in value.items())
    text = value.name if isinstance(value, Path) else str(value)
    if value is None or isinstance(value, bool):
        text = text.lower()
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")
