"""What is minimised: each objective turns a batch into a total loss, its parts and the outputs to be judged.

Beside inputs and targets it may be given the samples' numbers, for what was computed of them before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.anti_transfer import AntiTransfer
from qat.config import NetworkConfig, RHEmoConfig
from qat.models import VGG16, RHEmo, RHEmoEncoder
from qat.models.rhemo import DIMENSIONS


class Losses(NamedTuple):
    """``total`` is minimised; ``parts`` are scalars for the log; ``outputs`` are what the metrics judge."""

    total: Tensor
    parts: dict[str, Tensor]
    outputs: Tensor


class SpeechClassifier(nn.Module):
    """From a normalised spectrogram `[B, 1, 512, 128]` to logits `[B, K]`: RH-Emo's encoder (or none), then VGG16.

    Args:
        config: the network; ``rhemo_mode`` says how the encoder runs.
        num_classes: K.
    """

    def __init__(self, config: NetworkConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.encoder = RHEmoEncoder() if config.embeds else None
        self.embedding_scale: Tensor
        self.register_buffer("embedding_scale", torch.ones(()))
        self.net = VGG16(config, num_classes)
        if self.encoder is not None and config.rhemo_mode != "trainable":
            self.encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> SpeechClassifier:
        super().train(mode)
        if self.encoder is not None and self.config.rhemo_mode != "trainable":
            self.encoder.train(self.config.rhemo_mode == "batch-statistics")
        return self

    def embed(self, spectrogram: Tensor) -> Tensor:
        """What the VGG16 is given: `[B, 4, 64, 64]`, or the spectrogram itself in the real domain."""
        if self.encoder is None:
            return spectrogram
        trainable = self.config.rhemo_mode == "trainable"
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            return self.encoder(spectrogram) / self.embedding_scale

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.net(self.embed(spectrogram))[0]


class ClassificationObjective(nn.Module):
    """Cross-entropy plus anti-transfer (WASPAA 2023, equation 2); binary cross-entropy for word presence.

    Args:
        classifier: the network that is trained.
        anti_transfer: the term that pushes its features away from the twin's, if any.
        embedded: inputs are embeddings already (frozen encoder, computed once).
        multi_label: targets are `[B, V]` of 0 and 1 instead of `[B]` class indices.
    """

    def __init__(
        self,
        classifier: SpeechClassifier,
        anti_transfer: AntiTransfer | None,
        *,
        embedded: bool,
        multi_label: bool,
    ) -> None:
        super().__init__()
        self.classifier, self.anti_transfer = classifier, anti_transfer
        self.embedded, self.multi_label = embedded, multi_label

    def forward(self, inputs: Tensor, targets: Tensor, samples: Tensor | None = None) -> Losses:
        x = inputs if self.embedded else self.classifier.embed(inputs)
        logits, made = self.classifier.net(x, self.anti_transfer(x, samples) if self.anti_transfer else None)
        if self.multi_label:
            total = F.binary_cross_entropy_with_logits(logits, targets)
        else:
            total = F.cross_entropy(logits, targets)
        parts = {"cross_entropy": total.detach()}
        if self.anti_transfer is not None:
            loss, similarities = self.anti_transfer.total(made)
            total = total + loss
            parts |= {"anti_transfer": loss.detach(), **similarities}
        return Losses(total, parts, logits.detach())


class RHEmoObjective(nn.Module):
    r"""RH-Emo's loss (method section 3).

    .. math:: L = BCE(\hat x, x) + \beta (\beta_c CE + \beta_{vad} (BCE_v + BCE_a + BCE_d))

    Targets are `[B, 4]`: emotion class, then valence, arousal, dominance in {0, 1}; a NaN marks what a corpus does not
    annotate, and its term is left out.
    """

    def __init__(self, model: RHEmo, config: RHEmoConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, inputs: Tensor, targets: Tensor, samples: Tensor | None = None) -> Losses:
        embedding, reconstruction = self.model(inputs)
        # Clips outside the training part may be louder than its maximum, which stands for 1.
        per_sample = F.binary_cross_entropy(reconstruction, inputs.clamp(0, 1), reduction="none").flatten(1).mean(1)
        total = per_sample.mean()
        parts = {"reconstruction": total.detach()}
        if self.config.beta > 0:
            total = total + self.config.beta * self._supervised(self.model.classify(embedding), targets, parts)
        return Losses(total, parts, per_sample.detach())

    def _supervised(self, logits: dict[str, Tensor], targets: Tensor, parts: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), device=targets.device)
        for column, name in enumerate(("emotion", *DIMENSIONS)):
            known = ~targets[:, column].isnan()
            if not known.any():
                continue
            answers, truth = logits[name][known], targets[known, column]
            if name == "emotion":
                loss, weight = F.cross_entropy(answers, truth.long()), self.config.beta_class
            else:
                loss, weight = F.binary_cross_entropy_with_logits(answers[:, 0], truth), self.config.beta_vad
            parts[name] = loss.detach()
            total = total + weight * loss
        return total
