"""Settings as plain data, for YAML and JSON: written, read, compared."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from qat.config.experiment import EXECUTION, AntiTransferConfig, AnyExperiment, Experiment, RHEmoExperiment
from qkernels.losses import Loss, loss_of

C = TypeVar("C")

_type_hints = cache(get_type_hints)  # a grid compares hundreds of trainings with what is there


def to_plain(config: Any) -> Any:
    """A config as dicts, lists and strings, ready for YAML and JSON."""
    if isinstance(config, Loss):
        return config.plain()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def flatten(nested: dict[str, Any]) -> dict[str, Any]:
    """Values by ``group.field``; what such a field holds may be a mapping itself, and stays whole.

    >>> flatten({"task": "word", "corpus": {"name": "csv", "where": {"speaker": ["ann"]}}})
    {'task': 'word', 'corpus.name': 'csv', 'corpus.where': {'speaker': ['ann']}}
    """
    found: dict[str, Any] = {}
    for group, value in nested.items():
        found |= (
            {f"{group}.{field}": one for field, one in value.items()} if isinstance(value, dict) else {group: value}
        )
    return found


def identity_settings(plain: dict[str, Any]) -> dict[str, Any]:
    """The settings of a plain experiment that decide what is learnt, by ``group.field``.

    With other values of the rest a run may be resumed: on another device, after it ran out of memory, uncaptured, or
    with another cache. Settings that there were not yet when it was saved have their defaults.
    """
    kind: type[AnyExperiment] = RHEmoExperiment if "rhemo" in plain else Experiment
    free = ("cache", *(f"training.{name}" for name in EXECUTION))
    return {name: value for name, value in flatten(to_plain(from_plain(kind, plain))).items() if name not in free}


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first setting that differs, with its value in a run that is there and in one that is wanted.

    >>> difference({"task": "word", "training.lr": 0.1}, {"task": "word", "training.lr": 0.2})
    'training.lr 0.1, and this one has 0.2'
    >>> difference({"rhemo.width": 1.0}, {})
    'rhemo.width 1.0, and this one has None'
    """
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            return f"{name} {theirs.get(name)!r}, and this one has {ours.get(name)!r}"
    return None


def from_plain(kind: type[C], plain: dict[str, Any]) -> C:
    """Undo :func:`to_plain`: the config of class ``kind`` that a run or checkpoint was saved with."""
    plain = with_loss(plain) if kind is AntiTransferConfig else plain
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(plain.keys() - known):
        raise ValueError(f"{kind.__name__}: unknown setting {', '.join(unknown)}; saved by another version?")
    values = dict(plain)
    for name, hint in _type_hints(kind).items():  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hint) and name in values:
            values[name] = from_plain(hint, values[name])  # type: ignore[arg-type]
        elif hint is Loss and name in values:
            values[name] = loss_of(values[name])
        elif Path in (hint, *get_args(hint)) and values.get(name) is not None:
            values[name] = Path(values[name])
    return kind(**values)


_LOSS_FIELDS = {
    "semantics": "paper",
    "clamp": "each",
    "gram": "channel",
    "centred": False,
    "aggregation": "gram",
    "distance": "cos_squared",
}


def with_loss(settings: dict[str, Any]) -> dict[str, Any]:
    """Plain anti-transfer settings, which before there was ``loss`` were saved with six fields in its place.

    >>> with_loss({"layers": [2], "gram": "batch", "centred": True})
    {'layers': [2], 'loss': 'cka'}
    """
    if "loss" in settings or not settings.keys() & _LOSS_FIELDS:
        return settings
    rest = {name: value for name, value in settings.items() if name not in _LOSS_FIELDS}
    old = {name: settings.get(name, default) for name, default in _LOSS_FIELDS.items()}
    plain: dict[str, Any]
    if (old["aggregation"], old["distance"]) != ("gram", "cos_squared"):
        plain = {"name": old["distance"].replace("_", "-"), "aggregation": old["aggregation"]}
    elif old["semantics"] == "folded-rowwise":
        plain = {"name": "folded-rowwise", "clamp": old["clamp"]}
    elif old["gram"] == "batch":
        plain = {"name": "cka" if old["centred"] else "gram-batch"}
    else:
        plain = {"name": f"gram-{old['gram']}", "centred": old["centred"]}
    return rest | {"loss": loss_of(plain).plain()}
