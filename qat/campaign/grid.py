"""The paper's grid (WASPAA 2023, table 1 and figure 2): every training that its results are made of, in one plan.

RH-Emo in two stages; for each of two networks one that recognises words and one that recognises speakers; then for each
emotion corpus, split and network one training without anti-transfer (AT), one with AT against speakers (S) or words (W)
at each of 13 layers, and as many that go on from those with AT against the other: 2 + 4 + 12 (1 + 13 x 4) = 642.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from qat.campaign.stages import RUNS, Plan
from qat.config import AntiTransferConfig, AnyExperiment, Experiment, to_plain
from qat.config.preset import ATTRIBUTES, VALUES, experiment, merge, read_layers
from qat.data.corpora import iemocap
from qat.files import write_text

CORPORA = ("iemocap", "ravdess", "tess", "emodb", "emovo", "savee", "cremad", "demo")
"""Emotion corpora that a grid can have; the paper's are the first three."""

NETWORKS, SPLITS, METHODS = VALUES["network"], VALUES["split"], VALUES["at"]

_TASKS = {"S": "speaker", "W": "word"}
_LISTED = ("iemocap", "ravdess", "tess", "emodb")  # corpora of which the released code lists the actors of each part


@dataclass(frozen=True)
class Selection:
    """Which of the grid's emotion trainings; what they build on comes along.

    Args:
        corpora: of :data:`CORPORA`.
        networks: ``quaternion``, ``real``.
        splits: ``random``, ``actor``.
        at: kinds of anti-transfer, ``none`` among them: of :data:`METHODS`.
        layers: where it is applied, 1 to 13.
        seeds: of the emotion trainings; what they build on has one.
    """

    corpora: list[str] = field(default_factory=lambda: list(CORPORA[:3]))
    networks: list[str] = field(default_factory=lambda: list(NETWORKS))
    splits: list[str] = field(default_factory=lambda: list(SPLITS))
    at: list[str] = field(default_factory=lambda: list(METHODS))
    layers: list[int] = field(default_factory=lambda: list(range(1, 14)))
    seeds: list[int] = field(default_factory=lambda: [1])

    def __post_init__(self) -> None:
        known: dict[str, Sequence[Any]] = {
            "corpora": CORPORA,
            "networks": NETWORKS,
            "splits": SPLITS,
            "at": METHODS,
            "layers": range(1, 14),
        }
        for one in fields(self):
            values = getattr(self, one.name)
            for value in values:
                if one.name in known and value not in known[one.name]:
                    raise ValueError(f"{one.name}: {value!r} must be one of {', '.join(map(str, known[one.name]))}")
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{one.name}: {values!r} must be one or more, each once")


class Grid:
    """The trainings of a selection as a plan, with what each is in the paper's terms.

    Args:
        folder: for everything: ``plan.csv``, ``grid.yaml``, ``runs/<address>``, ``cache``.
        preset: of :data:`qat.config.preset.NAMES`.
        selection: which trainings.
        folders: of the corpora, by name; ``corpora/NAME`` for others.
        settings: a file of layers, see :mod:`qat.config.preset`, that lie over the preset's.

    Raises:
        ValueError: wrong settings.
    """

    def __init__(
        self,
        folder: Path,
        preset: str = "paper",
        selection: Selection | None = None,
        folders: Mapping[str, Path] | None = None,
        settings: Path | None = None,
    ) -> None:
        self.folder, self.preset, self.selection = folder, preset, selection or Selection()
        self.folders = dict(folders or {})
        self.own = read_layers(settings) if settings else []
        self.layers = read_layers(preset) + self.own
        self.plan = Plan(folder)
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        chosen = self.selection
        for seed in chosen.seeds:
            for network in chosen.networks:
                for corpus in chosen.corpora:
                    for split in chosen.splits:
                        for at in chosen.at:
                            for layer in [0] if at == "none" else chosen.layers:
                                self._emotion(network, corpus, split, at, layer, seed)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per training, what is built on first: ``run`` (its address; two that are the same training share it),
        ``stage``, ``network``, ``corpus``, ``split``, ``at``, ``layer``, ``seed``, ``name``."""
        return pd.DataFrame(list(self._rows.values()), dtype=object)

    def missing(self) -> list[str]:
        """One line for each corpus whose folder does not exist."""
        lines = {}
        for one in self.plan.trainings.values():
            name, folder = one.corpus.name, one.corpus.folder
            if not folder.exists():
                lines[name, folder] = f"{name}: no folder {folder}; name it with --folders '{{{name}: DIR}}'"
        return list(lines.values())

    def write(self) -> None:
        """Write ``plan.csv``, which a report reads, and ``grid.yaml``; they replace those of an earlier plan here."""
        buffer = io.StringIO()
        self.table.to_csv(buffer, index=False)
        write_text(self.folder / "plan.csv", buffer.getvalue())
        asked = {
            "preset": self.preset,
            **to_plain(self.selection),
            "folders": {name: str(path) for name, path in self.folders.items()},
            "settings": [{"when": dict(layer.when), "settings": layer.settings} for layer in self.own],
        }
        write_text(self.folder / "grid.yaml", yaml.safe_dump(asked, sort_keys=False))

    def _emotion(self, network: str, corpus: str, split: str, at: str, layer: int, seed: int) -> Path:
        place = {"network": network, "corpus": corpus, "split": split, "at": at, "layer": layer, "seed": seed}
        if (known := self._known("emotion", place)) is not None:
            return known
        made = self._experiment("emotion", place)
        assert isinstance(made, Experiment)
        kind, _, tasks = at.partition("_")
        initial, transfer = made.training.initial, made.anti_transfer
        if kind == "dual":
            initial = self._emotion(network, corpus, split, f"single_{tasks[0]}", layer, seed)
        if tasks:
            twin = None if transfer.random_twin else self._orthogonal(_TASKS[tasks[-1]], network)
            transfer = replace(transfer, layers=[layer], twin=twin)
        else:
            transfer = AntiTransferConfig()  # also where settings of all emotion trainings have a twin
        training = replace(made.training, initial=initial, seed=seed)
        return self._add("emotion", place, replace(made, anti_transfer=transfer, training=training))

    def _orthogonal(self, task: str, network: str) -> Path:
        place = {"network": network}
        return self._known(task, place) or self._add(task, place, self._experiment(task, place))

    @cached_property
    def _rhemo(self) -> Path:
        first = self._add("rhemo-1", {}, self._experiment("rhemo-1", {}))
        second = self._experiment("rhemo-2", {})
        return self._add("rhemo-2", {}, replace(second, training=replace(second.training, initial=first)))

    def _experiment(self, stage: str, place: Mapping[str, Any]) -> AnyExperiment:
        settings = merge({"stage": stage, **place}, self.layers, base(stage, place))
        corpus = settings["corpus"]
        corpus.setdefault("folder", str(self.folders.get(corpus["name"], Path("corpora") / corpus["name"])))
        settings["cache"] = str(self.folder / "cache")
        made = experiment(settings, stage)
        if isinstance(made, Experiment) and made.network.embeds and made.network.rhemo is None:
            made = replace(made, network=replace(made.network, rhemo=self._rhemo))
        return made

    def _known(self, stage: str, place: Mapping[str, Any]) -> Path | None:
        row = self._rows.get(_key(stage, place))
        return None if row is None else self.plan.folder / RUNS / row["run"]

    def _add(self, stage: str, place: Mapping[str, Any], made: AnyExperiment) -> Path:
        run = self.plan.add(made)
        layer = f"layer {place['layer']}" if place.get("layer") else None
        words = (stage, *(place.get(name) for name in ("network", "corpus", "split", "at")), layer)
        name = " ".join(str(word) for word in words if word is not None)
        values = {name: place.get(name) for name in ATTRIBUTES[1:]}
        self._rows[_key(stage, place)] = {"run": run.name, "stage": stage, **values, "name": name}
        return run


def _key(stage: str, place: Mapping[str, Any]) -> tuple[Any, ...]:
    return (stage, *(place.get(name) for name in ATTRIBUTES[1:]))


def base(stage: str, place: Mapping[str, Any]) -> dict[str, Any]:
    """What a training is before any preset: corpus, task, network and split.

    Args:
        stage: ``rhemo-1``, ``rhemo-2``, ``word``, ``speaker`` or ``emotion``.
        place: its ``network``; of emotion trainings also ``corpus`` and ``split``, where they are known.

    >>> base("speaker", {"network": "real"})
    {'corpus': {'name': 'iemocap', 'options': {'speaker': 'session'}}, 'task': 'speaker', 'network': {'domain': 'real'}}
    """
    network = {"network": {"domain": place["network"]}} if "network" in place else {}
    if stage.startswith("rhemo"):
        return {"corpus": {"name": "iemocap"}}
    if stage == "speaker":
        return {"corpus": {"name": "iemocap", "options": {"speaker": "session"}}, "task": "speaker", **network}
    if stage == "word":
        words = {"features": {"cut": "word"}, "split": {"rule": "part"}}
        return {"corpus": {"name": "librispeech"}, "task": "word", **words, **network}
    name = place.get("corpus", "iemocap")
    corpus = {"name": name, "where": {"emotion": list(iemocap.CLASSES)}} if name == "iemocap" else {"name": name}
    actor = "paper-actor" if name in _LISTED else "speaker"
    rule = actor if place.get("split") == "actor" else "random"
    return {"corpus": corpus, "split": {"rule": rule}, **network}
