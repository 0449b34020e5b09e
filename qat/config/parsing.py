"""Settings from plain data and the command line, checked one by one, with errors that say where a wrong one stands."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type

from qat.config.experiment import AnyExperiment, Experiment
from qkernels.losses import GramChannel, Loss, loss_of


@contextmanager
def prefix_errors(*place: object) -> Iterator[None]:
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
    if kind is Experiment:
        parser.set_defaults({"anti_transfer.loss": GramChannel.name})  # a dataclass would count as one of unknown type
    return parser


def _parsed_loss(value: Any) -> Loss:
    """The loss of a name or mapping, also of one as text."""
    with suppress(yaml.YAMLError):
        value = yaml.safe_load(value) if isinstance(value, str) else value
    return loss_of(value)


register_type(Loss, Loss.plain, _parsed_loss, type_check=isinstance)


def instantiate(parser: ArgumentParser, kind: type[AnyExperiment], settings: Any) -> AnyExperiment:
    """The experiment of parsed settings."""
    chosen = parser.instantiate(settings)
    return kind(**{one.name: chosen[one.name] for one in dataclasses.fields(kind)})
