"""The checkpoints that a training builds on, RH-Emo, initial weights and the twin, and checks that they fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qat.anti_transfer import AntiTransfer
from qat.config import AnyExperiment, Experiment, SpectrogramConfig, from_plain, prefix_errors, to_plain
from qat.models import VGG16, RHEmoEncoder, SpeechClassifier
from qat.training import distributed
from qat.training.checkpoint import Checkpoint, load_checkpoint
from qat.training.data import normalisation_kind


@dataclass(frozen=True)
class Pretrained:
    """The checkpoints that a classifier's training builds on, checked before anything expensive starts.

    Args:
        experiment: the training's settings.
        rhemo: RH-Emo of ``network.rhemo``.
        initial: classifier of ``training.initial``.
        twin: classifier of ``anti_transfer.twin``.
    """

    experiment: Experiment
    rhemo: Checkpoint | None
    initial: Checkpoint | None
    twin: Checkpoint | None

    @classmethod
    def load(cls, experiment: Experiment) -> Pretrained:
        """Read and check the checkpoints.

        Raises:
            ValueError: a checkpoint is missing, of another kind or network, or was trained on other inputs.
        """
        network, at = experiment.network, experiment.anti_transfer
        if network.rhemo_mode == "batch-statistics":
            distributed.require_one_process("network.rhemo_mode batch-statistics, which mixes the samples of a batch,")
        if not at.loss.per_sample:
            distributed.require_one_process(f"anti_transfer.loss {at.loss.name}, which mixes the samples of a batch,")
        if network.embeds and network.rhemo is None:
            raise ValueError(f"network.rhemo: the {network.domain} network needs a pretrained RH-Emo; none is set")
        pretrained = cls(
            experiment,
            load_checkpoint(network.rhemo, "rhemo") if network.embeds and network.rhemo else None,
            load_checkpoint(experiment.training.initial, "classifier") if experiment.training.initial else None,
            load_checkpoint(at.twin, "classifier") if at.twin else None,
        )
        if pretrained.rhemo is not None:
            check_inputs(experiment, pretrained.rhemo, "network.rhemo")
        if pretrained.initial is not None:
            pretrained._check_network(pretrained.initial, "training.initial")
        if pretrained.twin is not None:
            pretrained._check_network(pretrained.twin, "anti_transfer.twin")
        return pretrained

    def classifier(self, classes: list[str]) -> SpeechClassifier:
        """A new classifier with RH-Emo's encoder, and the VGG16 weights of ``training.initial`` if that is set."""
        classifier = SpeechClassifier(self.experiment.network, len(classes))
        if classifier.encoder is not None and self.rhemo is not None:
            self.rhemo.load_into(classifier.encoder, "encoder")
        if self.initial is not None:
            source = self._vgg(self.initial)
            if self.initial.classes != classes or self.experiment.training.initial_head == "new":
                source.classifier[-1] = classifier.net.classifier[-1]
            classifier.net.load_state_dict(source.state_dict())
            # If both trainings train the encoder, it starts from that of the initial weights, too.
            modes = {self.experiment.network.rhemo_mode, self.initial.experiment.network.rhemo_mode}
            if classifier.encoder is not None and modes == {"trainable"}:
                self.initial.load_into(classifier.encoder, "encoder")
        return classifier

    def anti_transfer(self) -> AntiTransfer | None:
        """The anti-transfer term, if there is a twin."""
        config = self.experiment.anti_transfer
        if config.random_twin:
            return AntiTransfer(config, VGG16(self.experiment.network, num_classes=2))
        return None if self.twin is None else AntiTransfer(config, self._vgg(self.twin))

    def _vgg(self, checkpoint: Checkpoint) -> VGG16:
        net = VGG16(self.experiment.network, len(checkpoint.classes))
        checkpoint.load_into(net, "net")
        return net

    def _check_network(self, checkpoint: Checkpoint, setting: str) -> None:
        own, other = self.experiment.network, checkpoint.experiment.network
        for field in ("domain", "width", "adaptive_pool"):
            if getattr(own, field) != getattr(other, field):
                raise ValueError(
                    f"{setting}: {checkpoint.path} has network.{field} {getattr(other, field)}, "
                    f"this experiment has {getattr(own, field)}; they must be equal"
                )
        check_inputs(self.experiment, checkpoint, setting)
        if self.rhemo is None or "trainable" in (own.rhemo_mode, other.rhemo_mode):
            return
        theirs, ours = checkpoint.part("encoder"), self.rhemo.part("encoder")
        for name, _ in RHEmoEncoder().named_parameters():
            if not torch.equal(theirs[name], ours[name]):
                raise ValueError(f"{setting}: {checkpoint.path} was trained on the embedding of another RH-Emo")


def check_inputs(experiment: AnyExperiment, checkpoint: Checkpoint, setting: str) -> None:
    """Check that a checkpoint was trained on the same kind of inputs; ``cut`` may differ, as words are shorter.

    Args:
        experiment: the training that builds on it.
        checkpoint: the checkpoint.
        setting: setting that names the checkpoint, for the error.

    Raises:
        ValueError: it was trained on other inputs.
    """
    own = to_plain(experiment.features) | {"normalisation": normalisation_kind(experiment)}
    with prefix_errors(checkpoint.path):
        features = from_plain(SpectrogramConfig, checkpoint.value("experiment").get("features"))
    other = to_plain(features) | {"normalisation": checkpoint.normalisation.kind}
    for field, value in own.items():
        if field != "cut" and value != other[field]:
            raise ValueError(
                f"{setting}: {checkpoint.path} was trained with {field} {other[field]}, this experiment has {value}; "
                "they must be equal"
            )
