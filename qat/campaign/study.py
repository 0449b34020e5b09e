"""Studies: emotion trainings that are compared with each other, described by a design file.

A design is a YAML file; ``qat/campaign/designs`` has those of ``qat demo`` and ``qat study``, to be copied and changed.
Networks start from random weights or from the network that anti-transfer pushes them away from. A second file describes
the speech that they learn from, so that one design can be tried on several corpora.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from qat.campaign.plan import Campaign, no_folder
from qat.campaign.stages import Stages
from qat.config import from_plain, prefix_errors
from qat.config.experiment import require
from qat.config.preset import TASKS, VALUES, as_list, check_values, parse_overrides, read_overrides
from qat.data.corpora import module
from qat.files import read_yaml

T = TypeVar("T")

DESIGNS, SPEECHES = ("demo", "study"), ("synthetic", "recorded")
_AT = {task: f"single_{letter}" for letter, task in TASKS.items()}


@dataclass(frozen=True)
class Speech:
    """The corpora of a study.

    Args:
        about: description for the report.
        corpus: emotion corpus.
        split: split of the emotion corpus: ``random``, ``actor`` or ``confounded``.
        preset: default preset for this speech.
        settings: overrides that are applied after the preset's, see :mod:`qat.config.preset`. They choose the
            recordings that RH-Emo and the networks of speakers and words learn from; none of those may have a speaker
            on which emotion networks are evaluated.
        redraw: whether each seed draws its own split, in every design.
    """

    about: str
    corpus: str
    split: str = "actor"
    preset: str = "small"
    settings: list[Any] = field(default_factory=list)
    redraw: bool = False

    def __post_init__(self) -> None:
        check_values("split", [self.split], VALUES["split"])


@dataclass(frozen=True)
class Entry:
    """Emotion trainings of a design: one per seed and combination of listed values.

    Args:
        name: name in reports; ``{start}``, ``{against}``, ``{loss}`` and ``{layer}`` stand for the values.
        start: initial weights: ``random``, the network of an orthogonal task (``speaker``, ``word``), or the name of an
            earlier emotion training, which this one continues.
        against: network that anti-transfer pushes away from: ``speaker``, ``word``, or a ``random`` twin as the
            control.
        loss: names in the design's ``losses``; the preset's own loss if empty.
        layer: ``each`` of the design's layers, the ``last`` of them, or numbers.
        watch: whether the similarity at all layers of the design is only monitored (beta 0), without anti-transfer.
        network: ``quaternion`` or ``real``.
        brief: whether it is part of the brief study.
    """

    name: str
    start: str | list[str] = "random"
    against: str | list[str] = "speaker"
    loss: str | list[str] = ""
    layer: str | int | list[int] = "last"
    watch: bool = False
    network: str = "quaternion"
    brief: bool = True


@dataclass(frozen=True)
class Remark:
    """A sentence in the report about what a study leaves out.

    Args:
        text: sentence; ``{layers}`` stands for the design's layers.
        brief: value of the design's ``brief`` with which the sentence applies; absent: both.
        real: value of the design's ``real`` with which it applies; absent: both.
    """

    text: str
    brief: bool | None = None
    real: bool | None = None


@dataclass(frozen=True)
class Design:
    """A study's emotion trainings.

    Args:
        emotion: entries.
        seeds: number of seeds, from 1.
        layers: layers of anti-transfer.
        losses: settings of ``anti_transfer`` by name.
        redraw: whether each seed draws its own split.
        real: whether the real network is trained too.
        brief: whether only the entries of the brief study are trained.
        not_run: remarks on what the study leaves out.
    """

    emotion: list[Entry]
    seeds: int = 1
    layers: list[int] = field(default_factory=lambda: [13])
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    redraw: bool = False
    real: bool = True
    brief: bool = False
    not_run: list[Remark] = field(default_factory=list)

    def __post_init__(self) -> None:
        rule = "one or more of 1 to 13"
        require(self.layers and set(self.layers) <= set(VALUES["layer"][1:]), "layers", self.layers, rule)
        for entry in self.emotion:
            with prefix_errors(entry.name):
                check_values("against", as_list(entry.against), ("speaker", "word", "random"))
                check_values("loss", as_list(entry.loss), ("", *self.losses))
                check_values("layer", as_list(entry.layer), ("each", "last", *VALUES["layer"][1:]))
                check_values("network", [entry.network], VALUES["network"])

    def remarks(self) -> list[str]:
        """Sentences on what the study leaves out."""
        layers = f"layer{'s' if len(self.layers) > 1 else ''} {', '.join(map(str, self.layers))}"
        return [
            remark.text.format(layers=layers)
            for remark in self.not_run
            if remark.brief in (None, self.brief) and remark.real in (None, self.real)
        ]


def read_design(source: str | Path) -> Design:
    """The design of this name (``demo``, ``study``) or file."""
    return _read(Design, source, DESIGNS)


def read_speech(source: str | Path) -> Speech:
    """The speech of this name (``synthetic``, ``recorded``) or file."""
    return _read(Speech, source, SPEECHES)


def plan_study(
    folder: Path,
    design: Design,
    speech: Speech,
    preset: str | None = None,
    seeds: Sequence[int] | None = None,
    folders: Mapping[str, Path] | None = None,
    settings: Path | None = None,
) -> Campaign:
    """The trainings of a design.

    Args:
        folder: folder of the campaign.
        design: emotion trainings.
        speech: corpora and default preset.
        preset: preset to use instead of the speech's.
        seeds: seeds to use instead of the design's.
        folders: folders of corpora, by name; ``corpora/NAME`` below the campaign's folder for others.
        settings: file of overrides that are applied after those of preset and speech.

    Raises:
        ValueError: wrong settings.
    """
    campaign = Campaign(folder)
    overrides = read_overrides(preset or speech.preset) + parse_overrides(speech.settings, "settings")
    overrides += read_overrides(settings) if settings else []
    stages = Stages(campaign, overrides, folders or {}, folder / "corpora")
    for seed in seeds or range(1, design.seeds + 1):
        runs: dict[tuple[str, str], Path] = {}
        for entry in design.emotion:
            if (entry.network == "real" and not design.real) or (design.brief and not entry.brief):
                continue
            for name, run in _add(entry, design, speech, stages, seed, runs):
                runs[entry.network, name] = run
    return campaign


def obtain(campaign: Campaign, packages: Path | None = None) -> None:
    """Make or fetch the missing corpora of a campaign.

    Args:
        campaign: campaign.
        packages: folder of Debian packages that were downloaded before.

    Raises:
        ValueError: a corpus can be neither made nor fetched.
    """
    for name, folder in campaign.missing_corpora().items():
        corpus: Any = module(name) if name != "csv" else None
        if hasattr(corpus, "make"):
            corpus.make(folder)
        elif hasattr(corpus, "fetch"):
            corpus.fetch(folder, from_dir=packages)
        else:
            raise no_folder({name: folder})


def _add(
    entry: Entry, design: Design, speech: Speech, stages: Stages, seed: int, runs: Mapping[tuple[str, str], Path]
) -> list[tuple[str, Path]]:
    """Add an entry's trainings of one seed; returns their names and folders."""
    layers = {"each": design.layers, "last": design.layers[-1:]}.get(str(entry.layer), entry.layer)
    added = []
    for start, against, loss, layer in itertools.product(
        as_list(entry.start), as_list(entry.against), as_list(entry.loss), [0] if entry.watch else as_list(layers)
    ):
        attributes = {"network": entry.network, "corpus": speech.corpus, "split": speech.split, "seed": seed}
        at = {"at": "none"} if entry.watch else {} if against == "random" else {"at": _AT[against]}
        training = stages.emotion(
            attributes | {"layer": layer} | at, {"anti_transfer": design.losses[loss]} if loss else None
        )
        if design.redraw or speech.redraw:
            training = replace(training, split=replace(training.split, seed=seed))
        training = stages.transferring(training, against, design.layers if entry.watch else [layer])
        if entry.watch:
            training = replace(training, anti_transfer=replace(training.anti_transfer, beta=0.0))
        if start != "random":
            if start not in _AT and (entry.network, start) not in runs:
                raise ValueError(f"{entry.name}: start: {start!r} must be random, speaker, word or an earlier entry")
            initial = stages.orthogonal(start, entry.network) if start in _AT else runs[entry.network, start]
            training = replace(training, training=replace(training.training, initial=initial))
        name = entry.name.format(start=start, against=against, loss=loss, layer=layer)
        # Without the attribute `at`, by which the cells of the paper's table 1 are recognised.
        run = stages.campaign.add(training, name, probe=True, stage="emotion", **attributes, layer=layer)
        added.append((name, run))
    return added


def _read(kind: type[T], source: str | Path, names: Sequence[str]) -> T:
    """An object of class ``kind`` from a YAML file of this package or of the user.

    Raises:
        ValueError: no such name or file, or wrong content.
    """
    if source in names:
        plain = read_yaml(files("qat.campaign") / "designs" / f"{source}.yaml")
    elif Path(source).is_file():
        plain = read_yaml(Path(source))
    else:
        raise ValueError(f"{source}: must be a file or one of {', '.join(names)}")
    with prefix_errors(source):
        return from_plain(kind, plain)
