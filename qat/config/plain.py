"""Settings as plain data for YAML and JSON: conversion, checks, comparison."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qat.config.experiment import EXECUTION, AntiTransferConfig, AnyExperiment, Experiment, RHEmoExperiment
from qkernels.losses import Loss, loss_of

C = TypeVar("C")


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
    """Values by ``group.field``; a mapping within a field is not flattened further.

    >>> flatten({"task": "word", "corpus": {"name": "csv", "where": {"speaker": ["ann"]}}})
    {'task': 'word', 'corpus.name': 'csv', 'corpus.where': {'speaker': ['ann']}}
    """
    flat: dict[str, Any] = {}
    for group, value in nested.items():
        inner = {f"{group}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {group: value}
        flat |= inner
    return flat


def identity_settings(plain: dict[str, Any]) -> dict[str, Any]:
    """The settings of a plain experiment that decide what is learnt, by ``group.field``.

    The other settings may change when a run is resumed, such as the device, the capture of steps or the cache folder.
    Settings that did not exist yet when the experiment was saved have their defaults.
    """
    kind: type[AnyExperiment] = RHEmoExperiment if "rhemo" in plain else Experiment
    free = ("cache", *(f"training.{name}" for name in EXECUTION))
    return {name: value for name, value in flatten(to_plain(from_plain(kind, plain))).items() if name not in free}


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first setting that differs, with its value in an existing run and in the wanted one.

    >>> difference({"task": "word", "training.lr": 0.1}, {"task": "word", "training.lr": 0.2})
    'training.lr 0.1, and this one has 0.2'
    >>> difference({"rhemo.width": 1.0}, {})
    'rhemo.width 1.0, and this one has None'
    """
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            return f"{name} {theirs.get(name)!r}, and this one has {ours.get(name)!r}"
    return None


def from_plain(kind: type[C], plain: Any, place: str = "") -> C:
    """The config of class ``kind`` from plain data, such as the result of :func:`to_plain` or a user's file.

    Args:
        kind: dataclass.
        plain: values by field; absent fields have their defaults.
        place: dotted name of the config within its parent, for errors.

    Raises:
        ValueError: an unknown setting or a wrong value, by its dotted name.

    >>> from_plain(Experiment, {"training": {"lr": "1e-3"}}).training.lr
    0.001
    >>> from_plain(Experiment, {"training": {"lr": "fast"}})
    Traceback (most recent call last):
    ValueError: training.lr: 'fast' must be a number
    """
    before = f"{place}: " if place else ""
    if not isinstance(plain, dict):
        raise ValueError(f"{before}{'null' if plain is None else repr(plain)} must be a mapping of settings")
    plain = with_loss(plain) if kind is AntiTransferConfig else plain
    hints = _hints(kind)  # type: ignore[arg-type]
    if unknown := [str(name) for name in plain if name not in hints]:
        raise ValueError(f"{before}unknown setting {', '.join(unknown)}; {kind.__name__} has {', '.join(hints)}")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in plain:
            raise ValueError(f"{before}must have {field.name}")
    dot = f"{place}." if place else ""
    return kind(**{name: _typed(hints[name], value, f"{dot}{name}") for name, value in plain.items()})


def typed_setting(kind: type[Any], name: str, value: Any) -> Any:
    """The typed value of one setting of the dataclass ``kind``, by its dotted name.

    Raises:
        ValueError: no such setting, or a wrong value.
    """
    hint: Any = kind
    for part in str(name).split("."):
        hints = _hints(hint) if dataclasses.is_dataclass(hint) else {}  # type: ignore[arg-type]
        if part not in hints:
            raise ValueError(f"{name}: unknown setting; {getattr(hint, '__name__', hint)} has {', '.join(hints)}")
        hint = hints[part]
    if dataclasses.is_dataclass(hint):
        raise ValueError(f"{name}: {value!r} must be of one setting; this is a group of settings")
    return _typed(hint, value, name)


@contextmanager
def prefix_errors(*place: object) -> Iterator[None]:
    """Prefix the errors of the block with the place of the wrong setting, in one line.

    Raises:
        ValueError: in place of a ValueError or TypeError.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(": ".join([*map(str, place), " ".join(str(error).split())])) from None


_RULES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}


@cache  # a grid compares hundreds of trainings with existing runs
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _typed(hint: Any, value: Any, place: str) -> Any:
    """A plain value as one of the type ``hint``."""
    of, inner = get_origin(hint) or hint, get_args(hint)
    if of in (Union, UnionType):
        *others, last = [member for member in inner if member is not NoneType]
        if value is None and NoneType in inner:
            return None
        for member in others:
            with suppress(ValueError):
                return _typed(member, value, place)
        return _typed(last, value, place)
    if hint is Any or (dataclasses.is_dataclass(of) and isinstance(value, of)):  # type: ignore[arg-type]
        return value
    if hint is Loss:
        return loss_of(value)
    if dataclasses.is_dataclass(of):
        return from_plain(of, value, place)  # type: ignore[arg-type]
    if of is list and isinstance(value, list):
        return [_typed(inner[0], item, f"{place}[{n}]") for n, item in enumerate(value)]
    if of is dict and isinstance(value, dict):
        return {_typed(inner[0], key, place): _typed(inner[1], item, f"{place}.{key}") for key, item in value.items()}
    if of is Path and isinstance(value, (str, Path)):
        return Path(value)
    if (of is Literal and value in inner) or (of in (str, bool) and isinstance(value, of)):
        return value
    if of in (int, float) and not isinstance(value, bool):
        with suppress(ValueError, TypeError, OverflowError):  # YAML takes 1e-3, without a point, for text
            number = float(value)
            if math.isfinite(number) if of is float else number.is_integer():
                return of(number)
    rule = f"one of {', '.join(map(str, inner))}" if of is Literal else _RULES.get(of, "a mapping")
    raise ValueError(f"{place}: {'null' if value is None else repr(value)} must be {rule}")


_LOSS_FIELDS = {
    "semantics": "paper",
    "clamp": "each",
    "gram": "channel",
    "centred": False,
    "aggregation": "gram",
    "distance": "cos_squared",
}


def with_loss(settings: dict[str, Any]) -> dict[str, Any]:
    """Plain anti-transfer settings with ``loss``; older files have six fields in its place.

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
