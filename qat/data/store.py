"""Prepared spectrograms on disk: every file is decoded and transformed once, then memory-mapped."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat.config import SpectrogramConfig
from qat.data.audio import AudioError, load_audio
from qat.data.manifest import Manifest, read_table, write_table
from qat.data.spectrogram import cut
from qat.files import make_once, read_json, sha256_of, write_json
from qat.processes import bar, process_map

LAYOUT = 2
"""Version of the files; raised whenever their meaning changes, so that old stores are not read."""

_FEW = 1200
"""Number of files below which no processes are started: importing PyTorch in each takes as long as 1200 short clips."""

_TABLES = "index.csv", "skipped.csv"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SpectrogramStore:
    """Prepared spectrograms of a corpus.

    Args:
        folder: folder with `magnitudes.npy`, `index.csv`, `skipped.csv` and `meta.json`.
        config: settings of the spectrograms.
        index: table with one row per cut: the manifest's columns, `cut` (its number in the file, from 0) and `frames`
            (number of frames before the padding). Row i belongs to `magnitudes[i]`.
        skipped: table with one row per file or segment that is not in the store: `path` and `reason`.
    """

    folder: Path
    config: SpectrogramConfig
    index: pd.DataFrame
    skipped: pd.DataFrame

    @classmethod
    def open(cls, folder: Path) -> SpectrogramStore:
        """Open a store.

        Raises:
            ValueError: there is no store in the folder, or one of another layout, or a file of it is damaged.
        """
        meta_file = folder / "meta.json"
        if not meta_file.is_file():
            raise ValueError(f"{folder}: holds no prepared spectrograms; make them with `qat prepare`")
        meta = read_json(meta_file, "layout", "config")
        if meta["layout"] != LAYOUT:
            raise ValueError(
                f"{meta_file}: layout {meta['layout']!r} is not {LAYOUT}; remove the folder and run `qat prepare` again"
            )
        if meta.pop("checksum", None) != _checksum(meta):
            raise _damaged(meta_file, "its checksum differs")
        for name in _TABLES:
            if sha256_of(folder / name) != meta[name]:
                raise _damaged(folder / name, "its checksum differs")
        config = SpectrogramConfig(**meta["config"])
        index, skipped = (read_table(folder / name) for name in _TABLES)
        store = cls(folder, config, index, skipped)
        store.magnitudes  # noqa: B018 - it is checked
        return store

    @cached_property
    def magnitudes(self) -> NDArray[np.float32]:
        """`[len(index), config.frames, config.bins]`, read-only, memory-mapped."""
        return read_array(self.folder / "magnitudes.npy", (len(self.index), self.config.frames, self.config.bins))

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Copy some spectrograms to memory: `[len(indices), config.frames, config.bins]`."""
        return torch.from_numpy(self.magnitudes[np.asarray(indices, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.index)


def prepare(
    manifest: Manifest,
    config: SpectrogramConfig,
    folder: Path,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> SpectrogramStore:
    """Spectrograms of a corpus, computed on the first call with the same files and settings.

    Files that are unreadable, silent or shorter than a window are skipped, logged, and listed in `skipped`.

    Args:
        manifest: corpus.
        config: settings of the spectrograms.
        folder: folder of all stores; this one is a sub-folder named after the corpus and a hash of its content
            (checksums and all columns of the manifest) and of the settings. It is complete or absent; another process
            that needs it meanwhile waits.
        workers: number of processes with one thread each; 0 works in this one; None takes the available cores,
            or works in this process where there are few files.
        progress: show a progress bar.

    Returns:
        The store, with rows in the manifest's order and the same bytes for any number of workers.

    Raises:
        ValueError: a file has changed since the manifest was made, or no file is usable.
    """
    settings = {"layout": LAYOUT, "config": asdict(config), "manifest": manifest.key}
    key = _checksum(settings)
    if workers is None and len(manifest) < _FEW:
        workers = 0
    target = Path(folder) / f"{manifest.name}-{key[:16]}"

    def make(draft: Path) -> None:
        for name, table in zip(_TABLES, _write(manifest, config, draft, workers, progress), strict=True):
            write_table(table, draft / name)
        meta = settings | {name: sha256_of(draft / name) for name in _TABLES}
        write_json(draft / "meta.json", meta | {"checksum": _checksum(meta)})

    make_once(target, make)
    store = SpectrogramStore.open(target)
    if count := len(store.skipped):
        log.warning("%s: %d of %d files skipped, see %s", manifest.name, count, len(manifest), target / "skipped.csv")
    return store


def _checksum(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_array(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Memory-map an array `shape` of float32 that is made again where it is lost.

    Raises:
        ValueError: there is no such file, or its content is another.
    """
    wanted = io.BytesIO()
    write_header(wanted, shape)
    header = wanted.getvalue()
    try:
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                raise ValueError(f"it is not the array of {shape} numbers in float32 that was written")
            return np.memmap(file, np.float32, "r", len(header), shape)
    except (OSError, ValueError) as error:  # shorter than its header says, too
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path}: damaged: {problem}; remove the folder, and it is made again")


def _write(
    manifest: Manifest, config: SpectrogramConfig, folder: Path, workers: int | None, progress: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    paths, checksums = manifest.table["path"].tolist(), manifest.table["checksum"].tolist()
    groups, segments = manifest.by_file(), manifest.segments
    tasks = [(manifest.root / paths[rows[0]], checksums[rows[0]], [segments[row] for row in rows]) for rows in groups]
    sources: list[int] = []
    cut_numbers: list[int] = []
    frames: list[int] = []
    skipped: list[tuple[str, str]] = []
    with (
        (folder / "magnitudes.npy").open("wb") as out,
        process_map(workers, torch.set_num_threads, 1) as run,
        bar(progress) as progress_bar,
    ):
        write_header(out, (0, config.frames, config.bins))
        start = out.tell()
        task = progress_bar.add_task(f"Spectrograms of {manifest.name}", total=len(paths))
        for rows, results in zip(groups, run(partial(_spectrograms, config), *zip(*tasks, strict=True)), strict=True):
            for row, result in zip(rows, results, strict=True):
                if isinstance(result, str):
                    skipped.append((paths[row], result))
                else:
                    cuts, sounding = result
                    out.write(cuts.tobytes())
                    sources += [row] * len(cuts)
                    cut_numbers += range(len(cuts))
                    frames += sounding
            progress_bar.advance(task, len(rows))
        if not sources:
            raise ValueError(f"{manifest.name}: no usable audio file among {len(paths)}; the first: {skipped[0][1]}")
        # numpy pads the header so that the first axis can grow: its length is written last.
        out.seek(0)
        write_header(out, (len(sources), config.frames, config.bins))
        assert out.tell() == start
    index = manifest.table.iloc[sources].reset_index(drop=True).assign(cut=cut_numbers, frames=frames)
    return index, pd.DataFrame(skipped, columns=["path", "reason"])


def _spectrograms(
    config: SpectrogramConfig, file: Path, checksum: str, segments: Sequence[tuple[float, ...]]
) -> list[tuple[NDArray[np.float32], list[int]] | str]:
    """For each segment of a file its cuts with their numbers of frames, or the reason to skip it."""
    results: list[tuple[NDArray[np.float32], list[int]] | str] = []
    for segment in segments:
        try:
            audio = load_audio(file, config.sample_rate, *segment)
        except AudioError as error:
            results.append(str(error))
            continue
        cuts = cut(audio, config).contiguous().numpy()
        sounding = min(config.frames, -(-len(audio) // config.hop) + 1)
        results.append((cuts, [sounding] * len(cuts)))
    if not all(isinstance(result, str) for result in results) and sha256_of(file) != checksum:
        raise ValueError(f"{file}: changed since the manifest was made (its checksum differs); make the manifest again")
    return results


def write_header(out: BinaryIO, shape: tuple[int, ...]) -> None:
    """Write what stands before the numbers of a `.npy` file of this shape, in float32."""
    np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
