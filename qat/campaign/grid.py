"""The paper's grid (WASPAA 2023, table 1 and figure 2): every training that its results are made of, in one plan.

RH-Emo in two stages; for each of two networks one that recognises words and one that recognises speakers; then for each
emotion corpus, split and network one training without anti-transfer (AT), one with AT against speakers (S) or words (W)
at each of 13 layers, and as many that go on from those with AT against the other: 2 + 4 + 12 (1 + 13 x 4) = 642.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from qat.campaign.plan import Campaign
from qat.campaign.stages import Stages
from qat.config import AntiTransferConfig
from qat.config.preset import VALUES, read_layers
from qat.data.corpora import EMOTION

_TASKS = {"S": "speaker", "W": "word"}


@dataclass(frozen=True)
class Selection:
    """Which of the grid's emotion trainings; what they build on comes along.

    Args:
        corpora: emotion corpora, of those that ``qat corpus list`` shows.
        networks: ``quaternion``, ``real``.
        splits: ``random``, ``actor``; ``confounded`` for the demo corpus.
        at: kinds of anti-transfer: ``none``, ``single_S``, ``single_W``, ``dual_SW``, ``dual_WS``.
        layers: layers that it is applied to, 1 to 13.
    """

    corpora: list[str] = field(default_factory=lambda: ["iemocap", "ravdess", "tess"])
    networks: list[str] = field(default_factory=lambda: ["quaternion", "real"])
    splits: list[str] = field(default_factory=lambda: ["random", "actor"])
    at: list[str] = field(default_factory=lambda: list(VALUES["at"]))
    layers: list[int] = field(default_factory=lambda: list(range(1, 14)))

    def __post_init__(self) -> None:
        allowed: dict[str, Sequence[Any]] = {
            "corpora": EMOTION,
            "networks": VALUES["network"],
            "splits": VALUES["split"],
            "at": VALUES["at"],
            "layers": range(1, 14),
        }
        for one in fields(self):
            values = getattr(self, one.name)
            for value in values:
                if value not in allowed[one.name]:
                    raise ValueError(f"{one.name}: {value!r} must be one of {', '.join(map(str, allowed[one.name]))}")
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{one.name}: {values!r} must be one or more, each once")


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
        selection: which trainings.
        seeds: seeds of the emotion trainings; what they build on has one.
        folders: folders of the corpora, by name; ``corpora/NAME`` for others.
        settings: file of layers, see :mod:`qat.config.preset`, that lie over the preset's.

    Raises:
        ValueError: wrong settings.
    """
    chosen, campaign = selection or Selection(), Campaign(folder)
    stages = Stages(campaign, read_layers(preset) + (read_layers(settings) if settings else []), folders or {})
    for place in product(seeds, chosen.networks, chosen.corpora, chosen.splits, chosen.at):
        attributes = dict(zip(("seed", "network", "corpus", "split", "at"), place, strict=True))
        for layer in [0] if attributes["at"] == "none" else chosen.layers:
            _add(stages, attributes | {"layer": layer})
    return campaign


def _add(stages: Stages, attributes: Mapping[str, Any]) -> Path:
    """Add an emotion training; the second half of dual anti-transfer goes on from the single one."""
    kind, _, tasks = attributes["at"].partition("_")
    made = stages.emotion(attributes)
    initial, transfer = made.training.initial, made.anti_transfer
    if kind == "dual":
        initial = _add(stages, {**attributes, "at": f"single_{tasks[0]}"})
    if tasks:
        twin = None if transfer.random_twin else stages.orthogonal(_TASKS[tasks[-1]], attributes["network"])
        transfer = replace(transfer, layers=[attributes["layer"]], twin=twin)
    else:
        transfer = AntiTransferConfig()  # also where settings of all emotion trainings have a twin
    made = replace(made, anti_transfer=transfer, training=replace(made.training, initial=initial))
    words = ["emotion", *(attributes[name] for name in ("network", "corpus", "split", "at"))]
    if tasks:
        words.append(f"layer {attributes['layer']}")
    return stages.campaign.add(made, " ".join(words), stage="emotion", **attributes)
