"""The command ``qat``: every stage of the method from the shell.

Exit codes: 0: done; 1: training failed, or some files cannot be used; 2: bad input, or something is missing on this
machine, with one line on stderr; 130: interrupted, by Ctrl-C, SIGTERM or SIGHUP.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import re
import signal
import sys
import threading
from collections.abc import Iterator

import qat
from qat import torchrun
from qat.commands import campaign, corpus, inspection, train
from qat.commands.output import show
from qat.commands.parser import Action, Commands, Parser
from qat.files import problems_in_a_line
from qat.memory import keep_freed_memory
from qat.processes import GROUP_SIGNALS


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that a terminal cannot show are escaped
            stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    logging.basicConfig(format="qat: %(message)s", level=logging.WARNING)
    parser, actions = build_parser()
    options = parser.parse_args(arguments)
    name, leaf = options.subcommand, options[options.subcommand]
    while "subcommand" in leaf:
        name, leaf = f"{name} {leaf.subcommand}", leaf[leaf.subcommand]
    again = "the same command with --resume" if "resume" in leaf else "the same command"
    try:
        leads = torchrun.leads()
        with _termination_as_interruption():
            options = parser.instantiate(options)
            for word in name.split():
                options = options[word]
            result = actions[name](options)
    except ValueError as error:
        return _fail(name, error, 2)
    except OSError as error:
        return _fail(name, f"{error}{_advice(error, again)}", 2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail(name, f"not enough memory for these settings ({str(error).splitlines()[0][:200]})", 2)
    except FloatingPointError as error:
        return _fail(name, error, 1)
    except KeyboardInterrupt:
        return _fail(name, f"interrupted; finished work is kept, and {again} continues", 130)
    if leads:
        show(result, options.json)
    problems = result.get("problems") if isinstance(result, dict) else None
    if problems and leads:
        _fail(name, problems_in_a_line(problems), 1)
    return 1 if problems else 0


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


@contextlib.contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """SIGTERM, which schedulers and containers send, and SIGHUP of a closed terminal end a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in GROUP_SIGNALS}
    heard = [number for number in former if former[number] != signal.SIG_IGN]  # nohup ignores SIGHUP
    for number in heard:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, former[number])


def _advice(error: OSError, again: str) -> str:
    """What to do about an error of the system; `again` is the command that continues."""
    written = re.search(r"\(os error (\d+)\)", str(error))  # as libraries in Rust write it
    number = int(written[1]) if written else error.errno
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"; make room there, then {again} continues"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "; change its permissions, or name another folder"
    if number in (errno.EMFILE, errno.ENFILE):
        return "; allow more open files, such as `ulimit -n 1024`"
    return ""


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether numpy, PyTorch's allocators or CUDA ran out of memory."""
    words = ("can't allocate memory", "out of memory", "Unable to allocate")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _fail(command: str, error: object, code: int) -> int:
    print(f"qat {command}: {error}", file=sys.stderr)
    return code
