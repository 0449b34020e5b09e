"""The parser of ``qat`` and the registry of its commands."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import register_type

from qkernels.losses import Loss, loss_of

Action = Callable[[Namespace], Any]
"""Runs a command with its options; the result is printed."""


class Parser(ArgumentParser):
    """A parser that answers bad input with one line instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(ex or message).split())
        print(f"{self.prog.replace(' [options]', '')}: {text}", file=sys.stderr)
        raise SystemExit(2)


class Commands:
    """Subcommands of a parser.

    Args:
        parser: parser that gets the subcommands.
        actions: registry of actions by full name, for example ``corpus check``.
        prefix: full name of ``parser``'s own command, with a space; empty for ``qat`` itself.
    """

    def __init__(self, parser: Parser, actions: dict[str, Action], prefix: str = "") -> None:
        self.actions = actions
        self._subcommands: Any = parser.add_subcommands(required=True)
        self._prefix = prefix

    def add(self, name: str, action: Action, text: str, parser: Parser | None = None) -> Parser:
        """The parser of a new command, explained by ``text``; ``parser`` if it needs one of a kind of its own."""
        parser = parser or Parser(description=text)
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
        self._subcommands.add_subcommand(name, parser, help=text)
        self.actions[self._prefix + name] = action
        return parser

    def group(self, name: str, text: str) -> Commands:
        """A command that has subcommands of its own."""
        parser = Parser(description=text)
        self._subcommands.add_subcommand(name, parser, help=text)
        return Commands(parser, self.actions, f"{self._prefix}{name} ")


def _parsed_loss(value: Any) -> Loss:
    """The loss of a name or mapping, also of one as text."""
    with suppress(yaml.YAMLError):
        value = yaml.safe_load(value) if isinstance(value, str) else value
    return loss_of(value)


register_type(Loss, Loss.plain, _parsed_loss, type_check=isinstance)


def instance(kind: type[Any], options: Namespace) -> Any:
    """An instance of the dataclass ``kind`` from the options of the same names."""
    return kind(**{field.name: options[field.name] for field in dataclasses.fields(kind)})
