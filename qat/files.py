"""Files and folders that are either whole or absent, locks, and checksums."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


class Busy(Exception):
    """A lock is held elsewhere; the text names process, host and time, as :func:`holder` does."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``: replaces it atomically on success, is removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``: renamed to it on success, removed on an error.

    Raises:
        ValueError: ``target`` exists and is not empty; files that are already there are never deleted.
    """
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target}: not empty, and not what would be made there; remove it or name another folder")
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        try:
            draft.rename(target)
        except OSError:
            if not any(target.iterdir()):
                raise
            # Another process finished the same work first; its result is as good.
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def held(lock: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock until the block ends, or this process.

    Where ``flock`` is not implemented, as on Lustre without its mount option, the file itself is the lock; a holder
    that was killed on another machine then leaves it behind, and it has to be deleted by hand.

    Args:
        lock: lock file; created where absent, and kept. A file beside it says who holds it.
        wait: wait for the present holder, instead of raising ``Busy``.

    Raises:
        Busy: another process or thread holds the lock.
        ValueError: the file cannot be locked.
    """
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
        raise ValueError(f"{lock}: cannot be locked ({error}); use a folder on a file system with locks") from None
    try:
        about = {"process": os.getpid(), "host": socket.gethostname()}
        write_json(_holder_file(lock), about | {"since": datetime.now().astimezone().isoformat(timespec="seconds")})
        yield
    finally:
        file_lock.release()


def holder(lock: Path) -> str:
    """Who holds a lock that is held: process, host, and since when."""
    try:
        about = json.loads(_holder_file(lock).read_text(encoding="utf-8"))
        return f"process {about['process']} on {about['host']} (since {about['since']})"
    except (OSError, ValueError, KeyError):
        return "a process that has not said which"


def _holder_file(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.holder")


def make_once(target: Path, make: Callable[[Path], None]) -> None:
    """Make a folder unless it exists; other processes that need it wait meanwhile.

    Without locks (:func:`held`) several processes may make it; the first result is kept.

    Args:
        target: folder; absent, or complete.
        make: fills the empty folder that it is given.
    """
    if target.exists():
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(held(target.with_name(f".{target.name}.lock"), wait=True))
        except ValueError as error:
            log.warning("%s; meanwhile other processes may repeat this work", error)
        if not target.exists():
            with new_folder(target) as draft:
                make(draft)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
