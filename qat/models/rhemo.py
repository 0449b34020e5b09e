"""RH-Emo: a real encoder to a 4-channel speech embedding, a quaternion decoder and four heads.

Source: Guizzo et al., "Learning speech emotion representations in the quaternion domain", 2022; the frozen encoder
feeds the quaternion networks (WASPAA 2023, section 2).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from qat.config import RHEmoConfig
from qat.models.vgg import scaled
from qkernels.nn import QuaternionBatchNorm2d, QuaternionConvTranspose2d

CLASSES = 5  # neutral, angry, happy, sad, everything else
DIMENSIONS = ("valence", "arousal", "dominance")


def _xavier_(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_normal_(module.weight)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


class _MaxPool(nn.MaxPool2d):
    """`nn.MaxPool2d`; where no gradient is wanted on a CPU, by maxima of slices in a tenth of the time.

    PyTorch also notes where each maximum is, which only a gradient needs.
    """

    def forward(self, x: Tensor) -> Tensor:
        gradients = torch.is_grad_enabled() and x.requires_grad
        if gradients or x.device.type != "cpu" or torch.compiler.is_compiling():
            pooled: Tensor = super().forward(x)
            return pooled
        height, width = self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size,) * 2
        bottom, right = (length // size * size for length, size in zip(x.shape[2:], (height, width), strict=True))
        x = functools.reduce(torch.maximum, [x[:, :, i:bottom:height] for i in range(height)])
        return functools.reduce(torch.maximum, [x[..., j:right:width] for j in range(width)])


class RHEmoEncoder(nn.Sequential):
    """Three real convolutions, `[B, 1, 512, 128] -> [B, 4, 64, 64]`, non-negative; pooling precedes batch norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.ReLU(),
            _MaxPool(2),
            nn.BatchNorm2d(2),
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            _MaxPool((2, 1)),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.ReLU(),
            _MaxPool((2, 1)),
        )
        self.apply(_xavier_)


class RHEmoDecoder(nn.Sequential):
    """Three quaternion transposed convolutions, `[B, 4, 64, 64] -> [B, 4, 512, 128]` in (0, 1)."""

    def __init__(self) -> None:
        super().__init__(
            QuaternionConvTranspose2d(4, 4, 3, stride=(2, 1), padding=1, output_padding=(1, 0)),
            nn.ReLU(),
            QuaternionBatchNorm2d(4),
            QuaternionConvTranspose2d(4, 4, 3, stride=(2, 1), padding=1, output_padding=(1, 0)),
            nn.ReLU(),
            QuaternionBatchNorm2d(4),
            QuaternionConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1),
            nn.Sigmoid(),
        )


def _head(hidden: int, outputs: int) -> nn.Sequential:
    head = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64 * 64, hidden),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(hidden, outputs),
    )
    return head.apply(_xavier_)


class RHEmo(nn.Module):
    """The autoencoder with its heads: 134,283,658 parameters at width 1.

    The emotion head (5 logits) reads channel r; the heads of valence, arousal and dominance (1 logit) read i, j and k.

    Args:
        config: ``width`` scales the heads' hidden layers.
    """

    def __init__(self, config: RHEmoConfig | None = None) -> None:
        super().__init__()
        hidden = scaled(4096, (config or RHEmoConfig()).width)
        self.encoder = RHEmoEncoder()
        self.decoder = RHEmoDecoder()
        self.heads = nn.ModuleDict(
            {"emotion": _head(hidden, CLASSES)} | {name: _head(hidden, 1) for name in DIMENSIONS}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding `[B, 4, 64, 64]` and reconstruction `[B, 1, 512, 128]`, the mean over the decoder's components."""
        embedding = self.encoder(x)
        return embedding, self.decoder(embedding).mean(1, keepdim=True)

    def classify(self, embedding: Tensor) -> dict[str, Tensor]:
        """The heads' logits: `emotion` `[B, 5]`, `valence`, `arousal`, `dominance` `[B, 1]`."""
        return {name: head(embedding[:, c : c + 1]) for c, (name, head) in enumerate(self.heads.items())}
