"""VGG16 in the real and the quaternion domain, with taps on its features (WASPAA 2023, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.config import NetworkConfig
from qat.models.layers import layers_of

Tap = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From features `[B, C, H, W]` to what the next layer is given in their place, and what is made of them."""

CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOL_AFTER = (2, 4, 7, 10, 13)
HIDDEN = 4096
INPUT = {"quaternion": (4, 64, 64), "real": (1, 512, 128), "real-on-embedding": (4, 64, 64)}

# The older anti-transfer code evaluates "layer n" up to, not including, convolution n.
_INPUT_OF_CONV = ("input", "relu1", "pool1", "relu3", "pool2", "relu5", "relu6",
                  "pool3", "relu8", "relu9", "pool4", "relu11", "relu12")  # fmt: skip


def tap_name(layer: int, position: str) -> str:
    """The feature map that "layer n" means.

    Args:
        layer: convolution 1..13.
        position: ``relu``, ``pre-relu``, ``slice`` or ``pool5``; see :class:`qat.config.AntiTransferConfig`.

    Raises:
        ValueError: the layer is not one of VGG16's thirteen convolutions.

    >>> tap_name(2, "relu"), tap_name(3, "slice")
    ('relu2', 'pool1')
    """
    if not 1 <= layer <= len(CHANNELS):
        raise ValueError(f"anti_transfer.layers: layer {layer} does not exist; VGG16 has convolutions 1 to 13")
    return {
        "relu": f"relu{layer}",
        "pre-relu": f"conv{layer}",
        "slice": _INPUT_OF_CONV[layer - 1],
        "pool5": "pool5",
    }[position]


def scaled(channels: int, width: float) -> int:
    """``channels * width`` as a positive multiple of 4, so that every width fits quaternions.

    >>> scaled(64, 1 / 8), scaled(64, 0.01)
    (8, 4)
    """
    return max(4, 4 * round(channels * width / 4))


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions, each with ReLU, five 2x2 max pools, three linear layers; no batch norm.

    Args:
        config: domain, width, initialisation, dropout and whether the 7x7 average pool is kept.
        num_classes: K, the number of logits.

    Shapes: input `[B, 4, 64, 64]` (embedding domains) or `[B, 1, 512, 128]` (real), output logits `[B, K]`.
    The last linear layer is real in every domain.
    """

    def __init__(self, config: NetworkConfig, num_classes: int) -> None:
        super().__init__()
        layers = layers_of(config)
        self._run = layers.run
        channels, height, width = INPUT[config.domain]
        self.convs = nn.ModuleList()
        for out_channels in (scaled(c, config.width) for c in CHANNELS):
            self.convs.append(layers.conv(channels, out_channels))
            channels = out_channels
        self.pool = nn.AdaptiveAvgPool2d(7) if config.adaptive_pool else nn.Identity()
        cells = 49 if config.adaptive_pool else (height // 32) * (width // 32)
        hidden = scaled(HIDDEN, config.width)
        self.classifier = nn.Sequential(
            *layers.hidden(channels * cells, hidden),
            nn.Dropout(config.dropout),
            *layers.hidden(hidden, hidden),
            nn.Dropout(config.dropout),
            layers.head(hidden, num_classes),
        )

    def forward(self, x: Tensor, taps: Mapping[str, Tap] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits `[B, K]`, and what each tap made of its features, from one forward pass.

        Args:
            x: the input.
            taps: by the name of a feature map (see :func:`tap_name`), what it goes through.
        """
        x, made = self._features(x, taps or {}, stop=False)
        return self.classifier(torch.flatten(self.pool(x), 1)), made

    def features_at(self, x: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """The feature maps with these names (see :func:`tap_name`); nothing deeper is computed."""
        return self._features(x, dict.fromkeys(names, lambda features: (features, features)), stop=True)[1]

    def _features(self, x: Tensor, taps: Mapping[str, Tap], stop: bool) -> tuple[Tensor, dict[str, Tensor]]:
        made: dict[str, Tensor] = {}

        def tap(name: str, features: Tensor) -> Tensor:
            if name in taps:
                features, made[name] = taps[name](features)
            return features

        x = tap("input", x)
        pools = 0
        for n, conv in enumerate(self.convs, 1):
            if stop and len(made) == len(taps):
                break
            relu, conv_name = f"relu{n}", f"conv{n}"
            pool = n in POOL_AFTER and not (stop and taps.keys() <= {*made, relu})
            if conv_name in taps:
                y, pooled = F.relu(tap(conv_name, self._run(conv, x, None)[0])), None
            else:
                y, pooled = self._run(conv, x, "relu", pool, relu in taps)
            # With a fused pool nothing follows the tapped map: the convolution adds its gradient to the pool's.
            y = tap(relu, y)
            x = y if pooled is None else pooled
            if pool:
                pools += 1
                x = tap(f"pool{pools}", F.max_pool2d(y, 2) if pooled is None else pooled)
        return x, made
