"""Files and folders that are either whole or absent, locks, and checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

LOCK = ".lock"
"""Name of the lock file in a run's folder."""

LARGEST = 16 << 20
"""Largest number of bytes of a JSON or YAML file that is read."""

MOST_ALIASES, MOST_LEVELS = 20, 40
"""What a YAML file may have, so that it cannot grow without bound as it is read."""

log = logging.getLogger(__name__)


class Busy(Exception):
    """A lock is held elsewhere; the text names process, host and time, as :func:`holder` does."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``: replaces it atomically on success, is removed on an error.

    Where this block holds the lock of ``path`` (:func:`held`), what killed writers of it have left is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_drafts(path)
    draft = _draft(path)
    try:
        with naming(path):
            yield draft
            with draft.open("rb") as written:
                os.fsync(written.fileno())  # else a crash of the machine may leave the new name with an empty file
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    """A new name beside ``path``; process numbers alone are the same in many a container, where most are 1."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


def _remove_drafts(path: Path) -> None:
    """Remove drafts of ``path``, if nobody else can be at work on one, as its folder or one above has a lock held here.

    Whether their writers live could not be told: they may be on another machine, and numbers of processes come again.
    """
    folder = Path(os.path.realpath(path.parent))
    if not any(folder.is_relative_to(Path(key).parent) for key in _held.get()):
        return
    draft = re.compile(rf"\.{re.escape(path.name)}\.\d+(-[0-9a-f]+)?\.part")
    for entry in folder.iterdir():
        if draft.fullmatch(entry.name):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system that name no file, such as that of a full disk, name ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON; NaN and infinity, which JSON has not, become null."""
    write_text(path, json.dumps(_without_nan(value), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object; NaN and infinity, as earlier versions wrote them, become None.

    Args:
        path: file.
        keys: keys that the object must have.

    Raises:
        ValueError: it is not readable, no object, or lacks a key; names the file.
    """
    try:
        value = json.loads(_text_of(path), parse_constant=lambda constant: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{path}: {', '.join(map(repr, missing))} is missing")
    return value


def read_yaml(path: Traversable) -> Any:
    """Read a YAML file of plain data.

    Raises:
        ValueError: it is not readable, has tags, one key twice, more than 20 aliases or 40 levels; names the file.
    """
    try:
        return yaml.load(_text_of(path), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None


class _PlainLoader(yaml.SafeLoader):
    """Bounds what a small file can grow to."""

    aliases = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.aliases += self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.aliases > MOST_ALIASES or self.depth > MOST_LEVELS:
            raise yaml.YAMLError(f"more than {MOST_ALIASES} aliases or {MOST_LEVELS} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"{', '.join(map(repr, sorted(twice)))} twice, from line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def read_text(path: Traversable) -> str:
    """The text of a file of at most 16 MiB.

    Raises:
        ValueError: it is larger, or not text in UTF-8; names the file.
    """
    try:
        return _text_of(path)
    except ValueError as error:
        raise ValueError(f"{path}: not readable as text: {error}") from None


def _text_of(path: Traversable) -> str:
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 20} MiB")
    return content.decode("utf-8")


@contextmanager
def held(lock: Path, *, wait: bool = False, nested: bool = False) -> Iterator[None]:
    """Hold a lock until the block ends, or this process.

    Where ``flock`` is not implemented, as on Lustre without its mount option, the file itself is the lock; a holder
    that was killed on another machine then leaves it behind, and it has to be deleted by hand.

    Args:
        lock: lock file; created where absent, and kept. A file beside it says who holds it.
        wait: wait for the present holder, instead of raising ``Busy``; for work that is short, and may be done twice
            where nothing can be locked: a warning says so then.
        nested: be content with a lock that is held around this block.

    Raises:
        Busy: another process or thread holds the lock.
        ValueError: the file system has no locks.
        OSError: the file cannot be made, as in a folder that is read-only.
    """
    key = os.path.realpath(lock)
    if nested and key in _held.get():
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    file_lock = FileLock(lock)
    try:
        try:
            file_lock.acquire(blocking=False)
        except Timeout:
            if not wait:
                raise Busy(holder(lock)) from None
            log.warning("%s: waiting for %s", lock, holder(lock))
            file_lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        problem = f"{lock}: cannot be locked ({error})"
        if not wait:
            raise ValueError(f"{problem}; use a folder on a file system with locks") from None
        log.warning("%s; meanwhile other processes may repeat this work", problem)
    token = _held.set(_held.get() | {key} if file_lock.is_locked else _held.get())
    try:
        if file_lock.is_locked:
            about = {"process": os.getpid(), "host": socket.gethostname()}
            write_json(_holder_file(lock), about | {"since": datetime.now().astimezone().isoformat(timespec="seconds")})
        yield
    finally:
        _held.reset(token)
        file_lock.release()


_held: ContextVar[frozenset[str]] = ContextVar("held", default=frozenset())

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def lock_of(path: Path) -> Path:
    """The lock of a file or folder, beside it."""
    return path.with_name(f".{path.name}.lock")


def holder(lock: Path) -> str:
    """Who holds a lock that is held: process, host, and since when."""
    try:
        about = read_json(_holder_file(lock))
        return f"process {about['process']} on {about['host']} (since {about['since']})"
    except (OSError, ValueError, KeyError):
        return "a process that has not said which"


def _holder_file(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.holder")


def make_once(target: Path, make: Callable[[Path], None], is_made: Callable[[Path], bool] = Path.exists) -> None:
    """Make a folder unless it is made; other processes that need it wait meanwhile.

    It is filled beside ``target``, renamed to it on success, and removed on an error. Without locks (:func:`held`)
    several processes may make it; the first result is kept.

    Args:
        target: folder.
        make: fills the empty folder that it is given.
        is_made: whether ``target`` is what would be made, and complete.

    Raises:
        ValueError: ``target`` is something else; files that are already there are never deleted.
    """
    if is_made(target):
        return
    with held(lock_of(target), wait=True):
        if is_made(target):
            return
        if target.is_dir() and any(target.iterdir()):
            raise ValueError(f"{target}: not empty, and not what would be made there; remove it or name another folder")
        _remove_drafts(target)
        draft = _draft(target)
        draft.mkdir()
        try:
            with naming(target):
                make(draft)
                try:
                    draft.rename(target)
                except OSError:
                    if not any(target.iterdir()):
                        raise
                    # Another process finished the same work first; its result is as good.
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def problems_in_a_line(problems: Sequence[Mapping[str, Any]]) -> str:
    """The first of several problems, with its file, and their number.

    Args:
        problems: ``problem``, and ``path`` where it is a file's.

    >>> problems_in_a_line([{"path": "a.wav", "problem": "is silent"}, {"path": "b.wav", "problem": "is not there"}])
    'a.wav: is silent (2 problems)'
    """
    path, problem = problems[0].get("path", ""), problems[0]["problem"]
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return f"{'' if path in problem else f'{path}: '}{problem} ({count})"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
