"""Does anti-transfer help, where, and why: the study behind the page of that name, at a size that two cores can do.

The paper compares networks that all start from random weights. Anti-transfer compares channels by their number there,
of which two unrelated networks share none. So here it also starts from the twin, and is compared with two losses that
do not go by the number of a channel (Gram matrices over positions, and over the samples of a batch), with a twin that
was trained on nothing, and with no anti-transfer at all: same seeds, same clips, several layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qat.campaign.study import Study
from qat.config import AntiTransferConfig, Experiment
from qkernels.losses import CKA, GramChannel, GramPosition, Loss

LAYERS = (2, 7, 13)
"""Early, where the paper advises anti-transfer for quaternion networks, middle and last."""

Gram = Literal["channel", "position", "batch"]
_GRAMS: tuple[Gram, ...] = ("channel", "position", "batch")
_LOSSES: dict[Gram, Loss] = {"channel": GramChannel(), "position": GramPosition(), "batch": CKA()}


@dataclass
class Inquiry(Study):
    """A study with many more emotion trainings, see the module; the other arguments are :class:`Study`'s.

    Args:
        layers: of the quaternion network.
        real: whether the real network on spectrograms takes part.
        brief: other Gram matrices than those of channels from the voice network only, and with channels only where the
            twin is random.
        real_width, real_epochs: the real network's width and epochs, in emotion and voice.

    Notes:
        Seeds decide initial weights, order, dropout and the split: which voice says which emotion, or which voices are
        the test. The pretrained networks are the same for all.
    """

    layers: tuple[int, ...] = LAYERS
    real: bool = True
    brief: bool = False
    real_width: float = 1 / 16
    real_epochs: int = 10

    def twins(self) -> dict[Path, Experiment]:
        real = {Path("twins/real-voice"): self._real(super().twin("voice"))} if self.real else {}
        return super().twins() | real

    def trainings(self) -> dict[Path, Experiment]:
        """Every emotion training by its folder: all settings of the first seed, then of the second..."""
        plain = self._experiment()
        found: dict[Path, Experiment] = {}
        for seed in self.seeds:
            for name, (start, against) in self._settings().items():
                found[Path("emotion", name, f"seed{seed}")] = replace(
                    plain,
                    corpus=self.material.emotion,
                    split=replace(self.material.split(seed), seed=seed),
                    anti_transfer=against,
                    training=replace(self._recipe.emotion, initial=start, seed=seed),
                )
        if self.real:
            for seed in self.seeds:
                for name in ("from-voice", *(f"from-voice-at-voice-channel-{layer}" for layer in self.layers)):
                    same = found[Path("emotion", name, f"seed{seed}")]
                    found[Path("emotion", f"real-{name}", f"seed{seed}")] = self._real(same)
        return found

    def not_run(self) -> list[str]:
        quaternion = f"layer{'s' if len(self.layers) > 1 else ''} {', '.join(map(str, self.layers))}"
        left = [
            f"The quaternion network was trained with anti-transfer at {quaternion} of 13, with beta 1 and never at "
            "several layers at once. Other Gram matrices than those of channels, the word network (as a start or as "
            "the twin) and random twins were tried at the last of them only.",
            "Every seed shares the same RH-Emo and the same twins: what others would give was not tried.",
        ]
        if self.brief:
            left.append(
                "Gram matrices of positions and of the batch were tried from the voice network's weights only, and a "
                "random twin with those of channels only, not from random weights."
            )
        if not self.real:
            return [*left, "The real network on spectrograms was not trained."]
        return [
            *left,
            f"The real network was trained at width {self.real_width:g}, for {self.real_epochs} epochs, at the same "
            "layers, from the voice network's weights against the voice by Gram matrices of channels; other starts, "
            "twins (a random one among them), Gram matrices and layers were not tried with it.",
        ]

    def _settings(self) -> dict[str, tuple[Path | None, AntiTransferConfig]]:
        """Initial weights and anti-transfer by name; without it, the similarity at every layer is watched."""
        voice, word = self.folder / "twins/voice", self.folder / "twins/word"
        last = self.layers[-1:]

        def against(start: Path | None, twin: Path | None, grams: tuple[Gram, ...], layers: tuple[int, ...]) -> None:
            for gram in grams:
                for layer in layers:
                    at = f"{twin.name if twin else 'random'}-{gram}-{layer}"
                    found[f"from-{start.name if start else 'random'}-at-{at}"] = (
                        start,
                        AntiTransferConfig(twin, [layer], loss=_LOSSES[gram], random_twin=twin is None),
                    )

        found: dict[str, tuple[Path | None, AntiTransferConfig]] = {}
        for start in (None, voice, word):
            watched = AntiTransferConfig(start or voice, list(self.layers), beta=0)
            found[f"from-{start.name if start else 'random'}"] = start, watched
            against(start, start or voice, _GRAMS[:1], last if start is word else self.layers)
            if start is voice or not self.brief:
                against(start, start or voice, _GRAMS[1:], last)
            if start or not self.brief:
                against(start, None, _GRAMS if start is voice and not self.brief else _GRAMS[:1], last)
        against(None, word, _GRAMS[:1], last)
        return found

    def _real(self, experiment: Experiment) -> Experiment:
        """The same of the real network on the spectrogram."""
        network = replace(experiment.network, domain="real", width=self.real_width, rhemo=None, embedding_scale="none")
        at, training = experiment.anti_transfer, experiment.training
        twin = self.folder / "twins/real-voice"
        return replace(
            experiment,
            network=network,
            anti_transfer=replace(at, twin=at.twin and twin),
            training=replace(training, epochs=self.real_epochs, initial=training.initial and twin),
        )
