"""The speech classifier: VGG16, after RH-Emo's encoder if it reads embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.config import NetworkConfig
from qat.models.rhemo import RHEmoEncoder
from qat.models.vgg import VGG16


class SpeechClassifier(nn.Module):
    """From a normalised spectrogram `[B, 1, 512, 128]` to logits `[B, K]`: RH-Emo's encoder (or none), then VGG16.

    Args:
        config: settings of the network; ``rhemo_mode`` decides whether the encoder is trained and uses batch
            statistics.
        num_classes: number of logits K.
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
        """Input of the VGG16: `[B, 4, 64, 64]`, or the spectrogram itself in the real domain."""
        if self.encoder is None:
            return spectrogram
        if self.config.rhemo_mode == "trainable":
            return self.encoder(spectrogram) / self.embedding_scale
        # In float32 whatever the precision, so that embeddings of a frozen encoder can be stored.
        with torch.no_grad(), torch.autocast(spectrogram.device.type, enabled=False):
            return self.encoder(spectrogram) / self.embedding_scale

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.net(self.embed(spectrogram))[0]
