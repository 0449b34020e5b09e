"""The paper's grid (WASPAA 2023): every training behind its table 1 and figure 2, in one plan.

RH-Emo has two stages. Each of the two networks is trained to recognise words and to recognise speakers. Then, for each
emotion corpus, split and network, there is one training without anti-transfer (AT) and, at each of 13 layers, one with
AT against speakers (S), one against words (W), and one that continues each of these against the other task. That is
2 + 4 + 12 (1 + 13 x 4) = 642 trainings.
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
        seeds: seeds of the emotion trainings; the networks that they build on have one seed.
        folders: folders of the corpora, by name; ``corpora/NAME`` for others.
        settings: file of overrides that are applied after the preset's, see :mod:`qat.config.preset`.

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
    """Add an emotion training; dual anti-transfer continues the single one."""
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
