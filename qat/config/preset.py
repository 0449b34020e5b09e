"""Presets: the settings of every training of the paper's grid, as files of overrides.

``paper`` takes the paper's reading wherever paper and released code disagree, ``released-code`` the code's; ``small``
is what learns in minutes, and ``demo`` the same on synthesised speech. A file is a list of overrides::

    - preset: small
    - settings: {training: {batch: 20}}
    - when: {network: real, stage: [word, speaker]}
      settings: {training: {batch: 40}}

``preset`` stands for all overrides of another one. An override holds for the trainings that have every attribute of its
``when``, with that value or one of a list; the later override wins. Settings are those of ``qat train``, or of ``qat
pretrain rhemo`` in RH-Emo's stages; each kind of training takes what it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from qat.config.experiment import AnyExperiment, Experiment, RHEmoExperiment, require
from qat.config.plain import flatten, from_plain, prefix_errors, typed_setting
from qat.files import read_yaml

NAMES = ("paper", "released-code", "demo", "small")
_PARTS = ("demo-corpus", "small-recorded")
"""Presets that others are made of."""

ATTRIBUTES = ("stage", "network", "corpus", "split", "at", "layer", "seed")
"""What tells trainings apart. RH-Emo's stages have no ``network``, and what follows it only emotion trainings have."""

METHODS = {
    "none": "no AT",
    "single_S": "single S",
    "single_W": "single W",
    "dual_SW": "dual SW",
    "dual_WS": "dual WS",
}
"""Titles of the attribute ``at``: without anti-transfer (AT), against the network of speakers or of words, or against
both, one after the other."""

SPLITS = {
    "random": ("random",),
    "actor": ("speaker", "speaker-in-order", "paper-actor"),
    "confounded": ("confounded",),
}
"""The attribute ``split``, and the values of ``split.rule`` that it stands for."""

VALUES: dict[str, Sequence[Any]] = {
    "stage": ("rhemo-1", "rhemo-2", "word", "speaker", "emotion"),
    "network": ("real", "quaternion"),
    "split": tuple(SPLITS),
    "at": tuple(METHODS),
    "layer": range(14),
}
"""Values of the attributes, in the order of the paper's tables; ``at`` none has layer 0."""

TASKS = {"S": "speaker", "W": "word"}
"""Orthogonal task by its letter in the attribute ``at``."""

PAPER_CORPORA = ("iemocap", "ravdess", "tess")
PAPER_SPLITS = ("random", "actor")
"""What the paper's tables are about."""

Plain = dict[str, Any]


def check_values(name: str, values: Sequence[Any], allowed: Sequence[Any]) -> None:
    """Refuse a value that is not among the allowed ones.

    Raises:
        ValueError: naming it and them.
    """
    for value in values:
        require(value in allowed, name, value, f"one of {', '.join(map(str, allowed))}")


@dataclass(frozen=True)
class Override:
    """Settings of some trainings.

    Args:
        settings: nested, as in a YAML file.
        when: allowed value by attribute, or a list of them; empty: of all trainings.
    """

    settings: Plain
    when: Plain = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.when.items():
            check_values("when", [name], ATTRIBUTES)
            if name in VALUES:
                check_values(f"when: {name}", as_list(values), VALUES[name])
        for name, value in flatten(self.settings).items():
            try:
                typed_setting(Experiment, name, value)
            except ValueError as error:  # it may be RH-Emo's
                with suppress(ValueError):
                    typed_setting(RHEmoExperiment, name, value)
                    continue
                raise error

    def matches(self, attributes: Mapping[str, Any]) -> bool:
        """Whether a training with these attributes takes it."""
        return all(name in attributes and attributes[name] in as_list(values) for name, values in self.when.items())


def as_list(value: Any) -> list[Any]:
    """A list, or the only value of one."""
    return value if isinstance(value, list) else [value]


def kind_of(stage: str) -> type[AnyExperiment]:
    """What a stage trains."""
    return RHEmoExperiment if stage.startswith("rhemo") else Experiment


def read_overrides(source: str | Path) -> list[Override]:
    """The overrides of a preset, or of a file of the same form.

    Raises:
        ValueError: no such preset or file, or one that is not of this form; unknown attributes and settings, and wrong
            values, are named with the override's number.
    """
    if source in (*NAMES, *_PARTS):
        return list(_packaged(str(source)))
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{source}: neither a file nor a preset; presets are {', '.join(NAMES)}")
    return parse_overrides(read_yaml(path), source)


@cache
def _packaged(name: str) -> tuple[Override, ...]:
    file = files("qat.config") / "presets" / f"{name}.yaml"
    return tuple(parse_overrides(read_yaml(file), name))


def parse_overrides(listed: Any, source: object) -> list[Override]:
    """The overrides of a list as a preset file holds it.

    Args:
        listed: content of the file, or of a part of it.
        source: name of the file, for errors.

    Raises:
        ValueError: as in :func:`read_overrides`.
    """
    if not isinstance(listed, list):
        raise ValueError(f"{source}: must be a list of overrides, each with `settings` and perhaps `when`")
    overrides: list[Override] = []
    for number, one in enumerate(listed, 1):
        with prefix_errors(source, f"override {number}"):
            if isinstance(one, dict) and one.keys() == {"preset"}:
                check_values("preset", [one["preset"]], (*NAMES, *_PARTS))
                overrides += _packaged(one["preset"])
            else:
                overrides.append(from_plain(Override, one))
    return overrides


def merge(attributes: Mapping[str, Any], overrides: Sequence[Override], base: Plain) -> Plain:
    """The settings of a training: ``base``, and over it every override that holds; of groups, field by field.

    Args:
        attributes: attributes of the training, see :data:`ATTRIBUTES`.
        overrides: the later wins.
        base: nested settings.

    >>> override = Override({"training": {"batch": 40}}, {"network": "real"})
    >>> merge({"network": "real"}, [override], {"training": {"batch": 20, "seed": 2}})
    {'training': {'batch': 40, 'seed': 2}}
    """
    groups = {field.name for field in fields(kind_of(attributes["stage"]))} if "stage" in attributes else None
    settings = {group: dict(value) if isinstance(value, dict) else value for group, value in base.items()}
    for override in overrides:
        for group, value in override.settings.items() if override.matches(attributes) else ():
            if groups is None or group in groups:
                settings[group] = settings.get(group, {}) | value if isinstance(value, dict) else value
    return settings


def settings_of(stage: str, attributes: Mapping[str, Any], overrides: Sequence[Override]) -> Plain:
    """The settings of one training of a preset, nested; what they do not say has its default.

    Args:
        stage: stage of the training.
        attributes: its other :data:`ATTRIBUTES`, as far as it has them; an emotion training's corpus is IEMOCAP if
            absent.
        overrides: overrides of the preset, applied after those of ``presets/stages.yaml``, which hold for all presets.

    >>> settings_of("speaker", {"network": "real"}, [])
    {'network': {'domain': 'real'}, 'corpus': {'name': 'iemocap', 'options': {'speaker': 'session'}}, 'task': 'speaker'}
    """
    attributes = {"stage": stage} | ({"corpus": "iemocap"} if stage == "emotion" else {}) | dict(attributes)
    base: Plain = {"corpus": {"name": attributes["corpus"]}} if "corpus" in attributes else {}
    if "network" in attributes and kind_of(stage) is Experiment:
        base["network"] = {"domain": attributes["network"]}
    return merge(attributes, [*_packaged("stages"), *overrides], base)


def experiment(settings: Plain, stage: str) -> AnyExperiment:
    """The experiment of a stage from nested settings; what they do not say has its default.

    Raises:
        ValueError: a wrong or unknown setting.
    """
    with prefix_errors(stage):
        return from_plain(kind_of(stage), settings)
