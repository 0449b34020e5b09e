"""The objectives, which compute from a batch a total loss, its parts and the outputs for the metrics.

They read no value back from the device, so that a step can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from qat.anti_transfer import AntiTransfer
from qat.config import RHEmoConfig
from qat.models import RHEmo, SpeechClassifier
from qat.models.rhemo import DIMENSIONS
from qkernels.runtime.precision import autocast_dtype

TERMS = ("emotion", *DIMENSIONS)
"""RH-Emo's supervised terms, in the order of its targets."""


class Losses(NamedTuple):
    """``total`` is minimised; ``parts`` are scalars for the log; metrics are computed from ``outputs``."""

    total: Tensor
    parts: dict[str, Tensor]
    outputs: Tensor


class ClassificationObjective(nn.Module):
    """Cross-entropy plus anti-transfer (WASPAA 2023, equation 2); binary cross-entropy for word presence.

    Args:
        classifier: the network that is trained.
        anti_transfer: term that pushes its features away from the twin's, if any.
        embedded: whether inputs are embeddings already (frozen encoder, computed once).
        multi_label: whether targets are `[B, V]` of 0 and 1 instead of `[B]` class indices.
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

    def forward(self, inputs: Tensor, targets: Tensor, **remembered: Tensor) -> Losses:
        x = inputs if self.embedded else self.classifier.embed(inputs)
        x = x.to(autocast_dtype(x.device.type) or x.dtype)  # once, for the network and its twin
        logits, tapped = self.classifier.net(x, self.anti_transfer(x, remembered) if self.anti_transfer else None)
        with record_function("loss"):
            if self.multi_label:
                total = F.binary_cross_entropy_with_logits(logits, targets)
            else:
                total = F.cross_entropy(logits, targets)
            parts = {"cross_entropy": total.detach()}
            if self.anti_transfer is not None:
                loss, similarities = self.anti_transfer.total(tapped)
                total = total + loss
                parts |= {"anti_transfer": loss.detach(), **similarities}
        return Losses(total, parts, logits.detach())


class RHEmoObjective(nn.Module):
    r"""RH-Emo's loss (method section 3).

    .. math:: L = BCE(\hat x, x) + \beta (\beta_c CE + \beta_{vad} (BCE_v + BCE_a + BCE_d))

    Targets are `[B, 4]`: emotion class, then valence, arousal, dominance in {0, 1}; NaN marks a missing annotation,
    which the mean of that term leaves out.

    Args:
        model: the network that is trained.
        config: weights of the terms.
        annotated: terms with annotations, of ``emotion``, ``valence``, ``arousal`` and ``dominance``.
    """

    def __init__(self, model: RHEmo, config: RHEmoConfig, annotated: Collection[str] = TERMS) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.annotated = annotated if config.beta > 0 else ()
        for name, head in model.heads.items():  # the optimiser knows those only that have gradients
            head.requires_grad_(name in self.annotated)

    def forward(self, inputs: Tensor, targets: Tensor) -> Losses:
        embedding, reconstruction = self.model(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            # Clips outside the training part may be louder than its maximum, which stands for 1.
            pixels = F.binary_cross_entropy(reconstruction.float(), inputs.clamp(0, 1), reduction="none")
        per_sample = pixels.flatten(1).mean(1)
        total = per_sample.mean()
        parts = {"reconstruction": total.detach()}
        if self.config.beta > 0:
            total = total + self.config.beta * self._supervised(self.model.classify(embedding), targets, parts)
        return Losses(total, parts, per_sample.detach())

    def _supervised(self, logits: dict[str, Tensor], targets: Tensor, parts: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), device=targets.device)
        for column, name in enumerate(TERMS):
            if name not in self.annotated:
                continue
            answers, truth, present = logits[name], targets[:, column], ~targets[:, column].isnan()
            truth = truth.where(present, 0)
            if name == "emotion":
                losses, weight = F.cross_entropy(answers, truth.long(), reduction="none"), self.config.beta_class
            else:
                losses = F.binary_cross_entropy_with_logits(answers[:, 0], truth, reduction="none")
                weight = self.config.beta_vad
            loss = losses.where(present, 0).sum() / present.sum().clamp(min=1)
            parts[name] = loss.detach()
            total = total + weight * loss
        return total
