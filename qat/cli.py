"""The command ``qat``: every stage of the method from the shell.

Exit codes: 0 done; 1 training failed, or a checked corpus has unusable files; 2 bad input, which one line on stderr
names; 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys

import qat
from qat.commands import campaign, corpus, inspection, train
from qat.commands.output import show
from qat.commands.parser import Action, Commands, Parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    logging.basicConfig(format="qat: %(message)s", level=logging.WARNING)
    parser, actions = build_parser()
    options = parser.parse_args(arguments)
    name, leaf = options.subcommand, options[options.subcommand]
    while "subcommand" in leaf:
        name, leaf = f"{name} {leaf.subcommand}", leaf[leaf.subcommand]
    try:
        options = parser.instantiate(options)
        for word in name.split():
            options = options[word]
        result = actions[name](options)
    except (ValueError, OSError) as error:
        return _fail(name, error, 2)
    except FloatingPointError as error:
        return _fail(name, error, 1)
    except KeyboardInterrupt:
        again = "the same command with --resume" if "resume" in leaf else "the same command"
        return _fail(name, f"interrupted; what is finished is kept, and {again} goes on", 130)
    if int(os.environ.get("RANK", 0)) == 0:
        show(result, options.json)
    return 1 if isinstance(result, dict) and result.get("problems") else 0


def build_parser() -> tuple[Parser, dict[str, Action]]:
    """The parser of all commands, and each command's action by full name."""
    parser = Parser(
        prog="qat",
        description="Speech emotion recognition with quaternion networks and anti-transfer learning. "
        "Start with `qat demo`; `qat COMMAND --help` explains each command.",
        version=qat.__version__,
    )
    commands = Commands(parser, actions={})
    campaign.add_demo(commands)
    campaign.add_study(commands)
    corpus.add_corpus(commands)
    corpus.add_prepare(commands)
    train.add_pretrain(commands)
    train.add_train(commands)
    campaign.add_sweep(commands)
    campaign.add_grid(commands)
    campaign.add_preset(commands)
    inspection.add_evaluate(commands)
    inspection.add_predict(commands)
    inspection.add_report(commands)
    inspection.add_doctor(commands)
    return parser, commands.actions


def _fail(command: str, error: object, code: int) -> int:
    print(f"qat {command}: {error}", file=sys.stderr)
    return code
