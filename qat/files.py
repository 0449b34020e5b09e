"""Files and folders that are either whole or absent, and checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, else is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` at once."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON at once."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` that takes its name when the block ends well, and is removed when it does not.

    Raises:
        ValueError: ``target`` exists and is not empty: nothing of anybody's is ever deleted.
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


def make_once(target: Path, make: Callable[[Path], None]) -> None:
    """Have ``make`` fill a folder that becomes ``target``, unless there is one; whoever else wants it waits meanwhile.

    Args:
        target: absent, or whole.
        make: is given an empty folder.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("a") as lock:
        # Without fcntl (Windows) or flock (some network file systems) several may make it; one of the results is kept.
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with new_folder(target) as draft:
                make(draft)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
