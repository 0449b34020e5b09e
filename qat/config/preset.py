"""Presets: the settings of every training of the paper's grid, as files of overrides.

Where paper and released code disagree, ``paper`` follows the paper and ``released-code`` the code; ``small`` trains in
minutes, and ``demo`` is ``small`` on synthesised speech. A file is a list of overrides::

    - preset: small
    - settings: {training: {batch: 20}}
    - when: {network: real, stage: [word, speaker]}
      settings: {training: {batch: 40}}

``preset`` includes all overrides of another preset. An override applies to trainings that match every attribute of its
``when``, by that value or one of a list; later overrides win. Settings are those of ``qat train``, or of ``qat pretrain
rhemo`` in RH-Emo's stages; each kind of training ignores the settings of the other.
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
"""Presets that other presets include."""

ATTRIBUTES = ("stage", "network", "corpus", "split", "at", "layer", "seed")
"""Attributes that distinguish trainings. RH-Emo's stages have only ``stage``; only emotion trainings have those after
``network``."""

METHODS = {
    "none": "no AT",
    "single_S": "single S",
    "single_W": "single W",
    "dual_SW": "dual SW",
    "dual_WS": "dual WS",
}
"""Titles of the values of ``at``: no anti-transfer (AT), AT against the network of speakers (S) or words (W), or first
against one and then against the other."""

SPLITS = {
    "random": ("random",),
    "actor": ("speaker", "speaker-in-order", "paper-actor"),
    "confounded": ("confounded",),
}
"""Values of the attribute ``split``, and the values of ``split.rule`` that each stands for."""

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
"""Corpora and splits of the paper's tables."""

Plain = dict[str, Any]


def check_values(name: str, values: Sequence[Any], allowed: Sequence[Any]) -> None:
    """Refuse values that are not allowed.

    Raises:
        ValueError: with the value and the allowed ones.
    """
    for value in values:
        require(value in allowed, name, value, f"one of {', '.join(map(str, allowed))}")


@dataclass(frozen=True)
class Override:
    """Settings of some trainings.

    Args:
        settings: nested settings, as in a YAML file.
        when: value, or list of allowed values, by attribute; empty: all trainings.
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
            except ValueError as error:  # unless it is a setting of RH-Emo
                with suppress(ValueError):
                    typed_setting(RHEmoExperiment, name, value)
                    continue
                raise error

    def matches(self, attributes: Mapping[str, Any]) -> bool:
        """Whether it applies to a training with these attributes."""
        return all(name in attributes and attributes[name] in as_list(values) for name, values in self.when.items())


def as_list(value: Any) -> list[Any]:
    """A list as it is, another value as a list of one."""
    return value if isinstance(value, list) else [value]


def kind_of(stage: str) -> type[AnyExperiment]:
    """The class of a stage's experiments."""
    return RHEmoExperiment if stage.startswith("rhemo") else Experiment


def read_overrides(source: str | Path) -> list[Override]:
    """The overrides of a preset, or of a file of the same form.

    Raises:
        ValueError: no such preset or file, wrong form, unknown attributes or settings, or wrong values, with the
            override's number.
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
    """The overrides of a list of the form of a preset file.

    Args:
        listed: content of the file, or a part of it.
        source: name of the file, for errors.

    Raises:
        ValueError: see :func:`read_overrides`.
    """
    if not isinstance(listed, list):
        raise ValueError(f"{source}: must be a list of overrides, each with `settings` and optionally `when`")
    overrides: list[Override] = []
    for number, entry in enumerate(listed, 1):
        with prefix_errors(source, f"override {number}"):
            if isinstance(entry, dict) and entry.keys() == {"preset"}:
                check_values("preset", [entry["preset"]], (*NAMES, *_PARTS))
                overrides += _packaged(entry["preset"])
            else:
                overrides.append(from_plain(Override, entry))
    return overrides


def merge(attributes: Mapping[str, Any], overrides: Sequence[Override], base: Plain) -> Plain:
    """The settings of a training: ``base`` with all matching overrides applied; groups are merged field by field.

    Args:
        attributes: attributes of the training, see :data:`ATTRIBUTES`.
        overrides: overrides; later ones win.
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
    """The nested settings of one training of a preset; absent settings have their defaults.

    Args:
        stage: stage of the training.
        attributes: other :data:`ATTRIBUTES` of the training; the default corpus of an emotion training is IEMOCAP.
        overrides: overrides of the preset, applied after those of ``presets/stages.yaml``, which all presets share.

    >>> settings_of("speaker", {"network": "real"}, [])
    {'network': {'domain': 'real'}, 'corpus': {'name': 'iemocap', 'options': {'speaker': 'session'}}, 'task': 'speaker'}
    """
    attributes = {"stage": stage} | ({"corpus": "iemocap"} if stage == "emotion" else {}) | dict(attributes)
    base: Plain = {"corpus": {"name": attributes["corpus"]}} if "corpus" in attributes else {}
    if "network" in attributes and kind_of(stage) is Experiment:
        base["network"] = {"domain": attributes["network"]}
    return merge(attributes, [*_packaged("stages"), *overrides], base)


def experiment(settings: Plain, stage: str) -> AnyExperiment:
    """The experiment of a stage from nested settings; absent settings have their defaults.

    Raises:
        ValueError: a wrong or unknown setting.
    """
    with prefix_errors(stage):
        return from_plain(kind_of(stage), settings)
