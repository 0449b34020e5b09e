"""Trainings that build on each other: a plan whose runs are found by what they are made of.

A run's folder is named after its address, a hash of every setting that decides what is learnt, among them the addresses
of the runs that it builds on. So nothing is trained twice, whoever planned it; and where a setting of RH-Emo changes,
all that builds on it has new addresses and is trained anew, and nothing else is.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qat.campaign.sweep import Layout, Outcome, train_all
from qat.config import AnyExperiment, difference, flatten, identity_settings, to_plain
from qat.files import sha256_of

CHECKPOINTS = ("network.rhemo", "anti_transfer.twin", "training.initial")
"""Settings that name a run to build on."""

RUNS = Path("runs")
"""Where a plan's runs lie, below its folder."""


class Plan:
    """Trainings in one folder, each in ``runs/<address>``.

    Args:
        folder: for all of them. It may be moved as a whole when nothing is being trained: what is finished is
            recognised, what is half-finished has to be deleted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainings: dict[Path, AnyExperiment] = {}
        self._hashes: dict[Path, str] = {}

    def add(self, experiment: AnyExperiment) -> Path:
        """Plan a training, unless it is planned already.

        Args:
            experiment: it builds on others of this plan by the folders that this method returned for them.

        Returns:
            Its run folder.
        """
        path = RUNS / self.address(experiment)
        self.trainings.setdefault(path, experiment)
        return self.folder / path

    def address(self, experiment: AnyExperiment) -> str:
        """16 hex digits that stand for all decisive settings which are not the defaults.

        A run of the plan that it builds on counts by its address, another checkpoint by its file's content, the corpus
        by its reader, folder, selection and options. ``cache`` and how it is computed (the device) do not count.
        """
        settings = identity_settings(to_plain(experiment))
        for name in CHECKPOINTS:
            if (path := settings.get(name)) is not None:
                settings[name] = self._identity(Path(path), name)
        default = identity_settings(to_plain(type(experiment)()))
        settings["corpus.folder"] = str(Path(settings["corpus.folder"]).absolute())
        different = {key: value for key, value in settings.items() if key not in default or default[key] != value}
        text = json.dumps({"kind": type(experiment).__name__} | different, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def needs(self, experiment: AnyExperiment) -> list[Path]:
        """The paths, below the folder, of the planned runs that an experiment builds on."""
        named = (flatten(to_plain(experiment)).get(name) for name in CHECKPOINTS)
        found = [RUNS / Path(path).name for path in named if path is not None and self._holds(Path(path))]
        return list(dict.fromkeys(found))

    def levels(self) -> list[dict[Path, AnyExperiment]]:
        """The trainings in groups: each builds on earlier groups only."""
        depth: dict[Path, int] = {}
        for path, experiment in self.trainings.items():  # what a training builds on was added before it
            depth[path] = max((depth[need] + 1 for need in self.needs(experiment)), default=0)
        groups: list[dict[Path, AnyExperiment]] = [{} for _ in range(max(depth.values(), default=-1) + 1)]
        for path, experiment in self.trainings.items():
            groups[depth[path]][path] = experiment
        return groups

    def finished(self) -> set[Path]:
        """The trainings that are finished.

        Raises:
            ValueError: a folder holds a run of other settings.
        """
        done = set()
        for path, experiment in self.trainings.items():
            result = self.folder / path / "result.json"
            if result.is_file():
                theirs = json.loads(result.read_text(encoding="utf-8"))["experiment"]
                if found := difference(_placeless(theirs), _placeless(to_plain(experiment))):
                    raise ValueError(
                        f"{self.folder / path}: holds a run with {found}; delete it, or choose another folder"
                    )
                done.add(path)
        return done

    def run(self, layout: Layout | None = None) -> list[Outcome]:
        """Train what is not finished, level by level; what builds on a training that failed is left out.

        Args:
            layout: where, see :func:`qat.campaign.sweep.train_all`.

        Returns:
            What became of each training, in the order of the plan.

        Raises:
            ValueError: as in :meth:`finished` and :func:`qat.campaign.sweep.train_all`.
        """
        outcomes: dict[Path, Outcome] = {}
        for level in self.levels():
            done = self.finished()
            ready: dict[Path, AnyExperiment] = {}
            for path, experiment in level.items():
                missing = [need for need in self.needs(experiment) if need not in done]
                if path in done:
                    result = json.loads((self.folder / path / "result.json").read_text(encoding="utf-8"))
                    outcomes[path] = Outcome(path, "finished", result=result)
                elif missing:
                    outcomes[path] = Outcome(path, "waiting", f"builds on {missing[0]}, which is not finished")
                else:
                    ready[path] = experiment
            outcomes |= {outcome.path: outcome for outcome in train_all(ready, self.folder, layout)}
        return [outcomes[path] for path in self.trainings]

    def _holds(self, path: Path) -> bool:
        return path.parent == self.folder / RUNS and RUNS / path.name in self.trainings

    def _identity(self, path: Path, setting: str) -> str:
        if self._holds(path):
            return path.name
        file = path / "model.safetensors" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{setting}: {path} must be a checkpoint, or a run of the plan that was added before")
        if file not in self._hashes:  # RH-Emo has half a gigabyte, and hundreds of trainings name it
            self._hashes[file] = sha256_of(file)
        return self._hashes[file]


def _placeless(plain: dict[str, Any]) -> dict[str, Any]:
    """Decisive settings in which the corpus, and what is built on, go by their names, wherever they lie."""
    settings = identity_settings(plain)
    paths = (*CHECKPOINTS, "corpus.folder")
    return settings | {name: Path(settings[name]).name for name in paths if settings.get(name) is not None}
