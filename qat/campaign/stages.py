"""The trainings of a preset with all that they build on: RH-Emo, networks of the orthogonal tasks, emotion networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qat.campaign.plan import Campaign
from qat.config import AnyExperiment, Experiment
from qat.config.preset import Override, Plain, experiment, merge, settings_of


class Stages:
    """Adds trainings of one preset to a campaign, with all that they build on.

    Args:
        campaign: campaign that trainings are added to.
        overrides: overrides of the preset and of the user, in order of application.
        folders: folders of corpora, by name.
        corpora: parent folder of all other corpora.
    """

    def __init__(
        self,
        campaign: Campaign,
        overrides: Sequence[Override],
        folders: Mapping[str, Path],
        corpora: Path = Path("corpora"),
    ) -> None:
        self.campaign, self.overrides, self.folders, self.corpora = campaign, overrides, folders, corpora
        self._orthogonal: dict[tuple[str, str], Path] = {}

    @cached_property
    def rhemo(self) -> Path:
        """Run folder of RH-Emo's second stage."""
        first = self.campaign.add(self._experiment("rhemo-1", {}), "rhemo-1", stage="rhemo-1")
        second = self._experiment("rhemo-2", {})
        second = replace(second, training=replace(second.training, initial=first))
        return self.campaign.add(second, "rhemo-2", stage="rhemo-2")

    def orthogonal(self, task: str, network: str) -> Path:
        """Run folder of the network of an orthogonal task, ``speaker`` or ``word``."""
        if (task, network) not in self._orthogonal:
            training = self._experiment(task, {"network": network})
            folder = self.campaign.add(training, f"{task} {network}", stage=task, network=network)
            self._orthogonal[task, network] = folder
        return self._orthogonal[task, network]

    def emotion(self, attributes: Mapping[str, Any], own: Plain | None = None) -> Experiment:
        """An emotion training from random weights with the preset's anti-transfer; it is not added to the campaign.

        Args:
            attributes: all :data:`qat.config.preset.ATTRIBUTES` except the stage.
            own: nested settings that override the preset's.
        """
        emotion = self._experiment("emotion", attributes, own)
        assert isinstance(emotion, Experiment)
        return replace(emotion, training=replace(emotion.training, seed=attributes["seed"]))

    def transferring(self, training: Experiment, against: str, layers: list[int]) -> Experiment:
        """The same training with anti-transfer at some layers, against ``speaker``, ``word`` or ``random`` weights."""
        at = training.anti_transfer
        random = against == "random" or at.random_twin
        twin = None if random else self.orthogonal(against, training.network.domain)
        return replace(training, anti_transfer=replace(at, twin=twin, random_twin=random, layers=layers))

    def _experiment(self, stage: str, attributes: Mapping[str, Any], own: Plain | None = None) -> AnyExperiment:
        settings = merge({}, [Override(own or {})], settings_of(stage, attributes, self.overrides))
        corpus = settings["corpus"]
        corpus.setdefault("folder", str(self.folders.get(corpus["name"], self.corpora / corpus["name"])))
        settings["cache"] = str(self.campaign.folder / "cache")
        training = experiment(settings, stage)
        if isinstance(training, Experiment) and training.network.embeds and training.network.rhemo is None:
            training = replace(training, network=replace(training.network, rhemo=self.rhemo))
        return training
