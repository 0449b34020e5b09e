"""Campaigns: many trainings in one folder, each with a content address. Data only; ``jobs.py`` trains them.

A run's folder is named after its address, a hash of every setting that decides what is learnt, which includes the
addresses of the runs that it builds on. So no training is repeated, whichever plan it is part of; and when a setting of
RH-Emo changes, all runs that build on it get new addresses and are trained again, and no others.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from qat.config import AnyExperiment, difference, flatten, identity_settings, to_plain
from qat.config.preset import ATTRIBUTES
from qat.files import held, lock_of, read_json, sha256_of, write_text

CHECKPOINTS = ("network.rhemo", "anti_transfer.twin", "training.initial")
"""Settings that name a run to build on."""

RUNS = Path("runs")
"""Folder of the runs within a campaign's folder."""

COLUMNS = ("run", *ATTRIBUTES, "name")
"""Columns of ``plan.csv``; attributes that a training does not have are empty."""


class Campaign:
    """Trainings in one folder, each in ``runs/<address>``.

    Args:
        folder: folder of the campaign. While nothing is being trained it may be moved as a whole: finished runs are
            recognised; unfinished ones have to be deleted.

    Attributes:
        trainings: experiment of each run, by the run's path below ``folder``; each after the runs that it builds on.
        names: name of each run in reports; the first name if it was added several times.
        probed: runs whose network is probed after its training, see :func:`qat.results.probes.analyse`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainings: dict[Path, AnyExperiment] = {}
        self.names: dict[Path, str] = {}
        self.probed: set[Path] = set()
        self._rows: dict[tuple[Any, ...], None] = {}
        self._hashes: dict[Path, str] = {}

    def add(self, experiment: AnyExperiment, name: str = "", *, probe: bool = False, **attributes: Any) -> Path:
        """Plan a training, unless it is planned already.

        Args:
            experiment: training. Checkpoints of other runs of the campaign are named by the folders that this method
                returned for them.
            name: name in reports; the address by default.
            probe: whether the trained network is probed.
            attributes: attributes of the training, see :data:`qat.config.preset.ATTRIBUTES`.

        Returns:
            The run's folder.
        """
        path = RUNS / self.address(experiment)
        self.trainings.setdefault(path, experiment)
        self.names.setdefault(path, name or path.name)
        if probe:
            self.probed.add(path)
        self._rows[path.name, *(attributes.get(column) for column in ATTRIBUTES), name or path.name] = None
        return self.folder / path

    @property
    def table(self) -> pd.DataFrame:
        """One row per training with :data:`COLUMNS`, each after those it builds on; equal trainings share a ``run``."""
        return pd.DataFrame(list(self._rows), columns=list(COLUMNS), dtype=object)

    @property
    def labels(self) -> dict[Path, str]:
        """Name of each run, and its seed where it has one."""
        seeds = dict(zip(self.table["run"], self.table["seed"], strict=True))
        return {
            path: name if seeds[path.name] is None else f"{name}, seed {seeds[path.name]}"
            for path, name in self.names.items()
        }

    def address(self, experiment: AnyExperiment) -> str:
        """Hash, in 16 hex digits, of the settings that decide what is learnt and differ from the defaults.

        Another run of the campaign is represented by its address, any other checkpoint by the hash of its file, the
        corpus by its reader, folder, selection and options. A folder within the campaign's is represented by its
        relative path, so that both can be moved. ``cache`` and settings such as the device do not count.
        """
        settings = identity_settings(to_plain(experiment))
        for name in CHECKPOINTS:
            if (path := settings.get(name)) is not None:
                settings[name] = self._identity(Path(path), name)
        default = _defaults(type(experiment))  # type: ignore[arg-type]
        corpus = Path(settings["corpus.folder"]).absolute()
        inside = corpus.is_relative_to(self._absolute)
        settings["corpus.folder"] = (corpus.relative_to(self._absolute) if inside else corpus).as_posix()
        different = {key: value for key, value in settings.items() if key not in default or default[key] != value}
        text = json.dumps({"kind": type(experiment).__name__} | different, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def needs(self, experiment: AnyExperiment) -> list[Path]:
        """Relative paths of the planned runs that an experiment builds on."""
        settings = flatten(to_plain(experiment))
        paths = (Path(settings[name]) for name in CHECKPOINTS if settings.get(name) is not None)
        return list(dict.fromkeys(RUNS / path.name for path in paths if self._has(path)))

    def finished(self) -> set[Path]:
        """The finished trainings, probed or not.

        Raises:
            ValueError: a run's folder holds other settings, or the campaign's folder is of an earlier version.
        """
        self._refuse_former_layout()
        done = set()
        for path, experiment in self.trainings.items():
            result = self.folder / path / "result.json"
            if result.is_file():
                theirs = read_json(result, "experiment")["experiment"]
                if text := difference(_without_paths(theirs), _without_paths(to_plain(experiment))):
                    raise ValueError(
                        f"{self.folder / path}: holds a run with {text}; delete it, or choose another folder"
                    )
                done.add(path)
        return done

    def missing_corpora(self) -> dict[str, Path]:
        """Missing folders of corpora, by the corpus's name."""
        corpora = (experiment.corpus for experiment in self.trainings.values())
        return {corpus.name: corpus.folder for corpus in corpora if not corpus.folder.exists()}

    def write(self, about: Mapping[str, Any]) -> None:
        """Write ``plan.csv``, which a report reads, and ``campaign.yaml``; earlier ones in the folder are replaced.

        Args:
            about: options of the campaign, such as design, preset and selection.
        """
        buffer = io.StringIO()
        self.table.to_csv(buffer, index=False)
        settings = yaml.safe_dump(to_plain(dict(about)), sort_keys=False, width=120)
        with held(lock_of(self.folder / "plan.csv"), wait=True):  # of two commands at once, both files are of one
            write_text(self.folder / "plan.csv", buffer.getvalue())
            write_text(self.folder / "campaign.yaml", settings)

    @cached_property
    def _absolute(self) -> Path:
        return self.folder.absolute()

    def _refuse_former_layout(self) -> None:
        former = [self.folder / name for name in ("demo.json", "grid.yaml", "result.json")]
        entries = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        others = [entry for entry in entries if entry.is_dir() and entry.name not in ("runs", "corpora", "cache")]
        former = [path for path in former if path.is_file()]
        former += [path for folder in others for path in folder.rglob("result.json")][:1]
        if former:
            raise ValueError(
                f"{self.folder}: has {former[0].relative_to(self.folder)}, of an older layout than plan.csv and "
                "runs/ADDRESS; choose another folder"
            )

    def _has(self, path: Path) -> bool:
        return path.parent == self.folder / RUNS and RUNS / path.name in self.trainings

    def _identity(self, path: Path, setting: str) -> str:
        if self._has(path):
            return path.name
        file = path / "model.safetensors" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{setting}: {path} must be a checkpoint, or a run of the plan that was added before")
        if file not in self._hashes:  # RH-Emo takes half a gigabyte, and hundreds of trainings name it
            self._hashes[file] = sha256_of(file)
        return self._hashes[file]


def no_folder(corpora: Mapping[str, Path]) -> ValueError:
    """The error for corpora whose folders are missing."""
    text = "{0}: no folder {1}; name it with --folders '{{{0}: DIR}}'"
    return ValueError("; ".join(text.format(*item) for item in corpora.items()))


@cache
def _defaults(kind: Callable[[], AnyExperiment]) -> dict[str, Any]:
    return identity_settings(to_plain(kind()))


def _without_paths(plain: dict[str, Any]) -> dict[str, Any]:
    """Settings that decide what is learnt, with names of corpus and checkpoints instead of their paths."""
    settings = identity_settings(plain)
    paths = (*CHECKPOINTS, "corpus.folder")
    return settings | {name: Path(settings[name]).name for name in paths if settings.get(name) is not None}
