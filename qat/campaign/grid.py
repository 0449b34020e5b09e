"""The paper's grid (WASPAA 2023, table 1 and figure 2): every training that its results are made of, in one plan.

RH-Emo in two stages; for each of two networks one that recognises words and one that recognises speakers; then for each
emotion corpus, split and network one training without anti-transfer (AT), one with AT against speakers (S) or words (W)
at each of 13 layers, and as many that go on from those with AT against the other: 2 + 4 + 12 (1 + 13 x 4) = 642.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from qat.campaign.options import Selection
from qat.campaign.plan import Campaign
from qat.campaign.stages import Stages
from qat.config import AntiTransferConfig
from qat.config.preset import TASKS, read_overrides


def plan_grid(
    folder: Path,
    preset: str = "paper",
    selection: Selection | None = None,
    seeds: Sequence[int] = (1,),
    folders: Mapping[str, Path] | None = None,
    settings: Path | None = None,
) -> Campaign:
    """The trainings of a selection.

    Args:
        folder: folder of the campaign.
        preset: preset, of :data:`qat.config.preset.NAMES`, or a file of the same form.
        selection: emotion trainings.
        seeds: seeds of the emotion trainings; what they build on has one.
        folders: folders of the corpora, by name; ``corpora/NAME`` for others.
        settings: file of overrides, see :mod:`qat.config.preset`, applied after the preset's.

    Raises:
        ValueError: wrong settings.
    """
    chosen, campaign = selection or Selection(), Campaign(folder)
    stages = Stages(campaign, read_overrides(preset) + (read_overrides(settings) if settings else []), folders or {})
    for place in product(seeds, chosen.networks, chosen.corpora, chosen.splits, chosen.at):
        attributes = dict(zip(("seed", "network", "corpus", "split", "at"), place, strict=True))
        for layer in [0] if attributes["at"] == "none" else chosen.layers:
            _add(stages, attributes | {"layer": layer})
    return campaign


def _add(stages: Stages, attributes: Mapping[str, Any]) -> Path:
    """Add an emotion training; the second half of dual anti-transfer goes on from the single one."""
    kind, _, tasks = attributes["at"].partition("_")
    training = stages.emotion(attributes)
    if kind == "dual":
        first = _add(stages, {**attributes, "at": f"single_{tasks[0]}"})
        training = replace(training, training=replace(training.training, initial=first))
    name = " ".join(["emotion", *(attributes[name] for name in ("network", "corpus", "split", "at"))])
    if tasks:
        training = stages.transferring(training, TASKS[tasks[-1]], [attributes["layer"]])
        name += f" layer {attributes['layer']}"
    else:
        training = replace(training, anti_transfer=AntiTransferConfig())  # also where overrides name a twin for all
    return stages.campaign.add(training, name, stage="emotion", **attributes)
