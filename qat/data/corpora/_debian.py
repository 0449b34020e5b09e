"""Corpora that are packages of Debian's archive: downloaded and unpacked, never installed, without root."""

from __future__ import annotations

import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from qat.data.manifest import Manifest
from qat.files import make_once


def fetch(
    folder: Path,
    packages: Sequence[str],
    read: Callable[[Path], Manifest],
    from_dir: Path | None = None,
    progress: bool = True,
) -> Manifest:
    """Download packages with apt-get, unpack them into a folder and read the corpus in it.

    Args:
        folder: new folder, or one that already holds the corpus, which is then only read. Another process that fetches
            it meanwhile is waited for.
        packages: names of the packages.
        read: reader of the corpus.
        from_dir: folder with `NAME_*.deb`, instead of downloading them.
        progress: show progress.

    Returns:
        The manifest.

    Raises:
        ValueError: apt-get or dpkg-deb is missing or fails, a package is not in `from_dir`, or the folder holds
            something else.
    """
    folder = Path(folder)

    def unpack(draft: Path) -> None:
        if shutil.which("dpkg-deb") is None:
            raise ValueError(f"dpkg-deb is needed to unpack {', '.join(packages)} and is not on this machine")
        console = Console(stderr=True, quiet=not progress)
        with tempfile.TemporaryDirectory() as scratch:
            if from_dir is None:
                with console.status(f"Downloading {', '.join(packages)}"):
                    _download(packages, Path(scratch))
            for package in packages:
                with console.status(f"Unpacking {package}"):
                    _run("dpkg-deb", "-x", _find(package, from_dir or Path(scratch)), draft)
        _drop_all_but_files(draft)
        read(draft)

    make_once(folder, unpack, lambda folder: folder.is_dir() and any(folder.iterdir()))
    return read(folder)


def _drop_all_but_files(folder: Path) -> None:
    """Keep only folders, plain files without setuid and setgid bits, and links among them; no devices, pipes,
    sockets."""
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        inside = stat.S_ISLNK(mode) and path.resolve().is_relative_to(folder.resolve())
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or inside):
            path.unlink()
        elif not inside and mode & (stat.S_ISUID | stat.S_ISGID):
            path.chmod(mode & 0o777)


def _download(packages: Sequence[str], folder: Path) -> None:
    if shutil.which("apt-get") is None:
        raise ValueError(
            f"apt-get is not on this machine; download the Debian packages {', '.join(packages)} elsewhere and name "
            "their folder with --from"
        )
    # A private state folder: apt-get then needs no root, and neither uses nor changes the machine's package lists.
    state = folder / "apt"
    (state / "lists" / "partial").mkdir(parents=True)
    (state / "cache" / "archives" / "partial").mkdir(parents=True)
    settings = {
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state / "cache",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": 1,
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    _run("apt-get", *options, "update", folder=folder)
    _run("apt-get", *options, "download", *packages, folder=folder)


def _find(package: str, folder: Path) -> Path:
    files = sorted(Path(folder).glob(f"{package}_*.deb"))
    if not files:
        raise ValueError(f"{folder}: no package file {package}_*.deb in this folder")
    return files[-1]


def _run(*command: object, folder: Path | None = None) -> None:
    process = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"{command[0]} failed with status {process.returncode}: {lines[-1]}")
