"""Settings from plain data, checked one by one, with errors that say where a wrong one stands."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser

from qat.config import AnyExperiment


@contextmanager
def naming(*place: object) -> Iterator[None]:
    """Say in one line where a wrong setting stands.

    Raises:
        ValueError: instead of any error of a setting, with ``place`` before it.
    """
    try:
        yield
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(": ".join([*map(str, place), " ".join(str(error).split())])) from None


def check(kind: type[AnyExperiment], setting: object, value: object) -> None:
    """Refuse what a parser lets through: a value instead of a group of settings, and null for everything.

    Args:
        kind: of the experiment.
        setting: its dotted name.
        value: its plain value.

    Raises:
        ValueError: naming both.
    """
    found: Any = kind
    for part in str(setting).split("."):
        if not dataclasses.is_dataclass(found):
            return
        if part not in {one.name for one in dataclasses.fields(found)}:
            command = "qat train" if kind.__name__ == "Experiment" else "qat pretrain rhemo"
            raise ValueError(f"{setting}: {value!r} must be of a setting that `{command}` has")
        found = get_type_hints(found)[part]
    if dataclasses.is_dataclass(found):
        raise ValueError(f"{setting}: {value!r} must be of one setting; this is a group of them")
    if value is None and type(None) not in get_args(found):
        raise ValueError(f"{setting}: null must be a value; this setting cannot be absent")


@cache
def parser_of(kind: type[AnyExperiment]) -> ArgumentParser:
    """A parser of all settings of one kind of experiment."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    return parser


def instantiate(parser: ArgumentParser, kind: type[AnyExperiment], settings: Any) -> AnyExperiment:
    """The experiment of parsed settings."""
    chosen = parser.instantiate(settings)
    return kind(**{one.name: chosen[one.name] for one in dataclasses.fields(kind)})
