"""VGG16 in the real and the quaternion domain, with taps on its features (WASPAA 2023, section 3)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.config import NetworkConfig
from qat.models.layers import Link, layers_of
from qkernels import PackedWeight, runtime
from qkernels.ops._library import autocast_dtype

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
        self._layers = layers
        channels, height, width = INPUT[config.domain]
        # A frozen network's packed weights, by the version of the weights, which are kept with them so that no other
        # tensor takes their identity. None is dropped: a CUDA graph may read it.
        self._frozen: dict[Any, tuple[list[Tensor], list[PackedWeight | None]]] = {}
        self.convs = nn.ModuleList()
        for out_channels in (scaled(c, config.width) for c in CHANNELS):
            self.convs.append(layers.conv(channels, out_channels))
            channels = out_channels
        self.pool = nn.AdaptiveAvgPool2d(7) if config.adaptive_pool else nn.Identity()
        self._last_map = (7, 7) if config.adaptive_pool else (height // 32, width // 32)
        cells = self._last_map[0] * self._last_map[1]
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
        packed = self._packed(x, len(self.convs), hidden=True)
        x, made = self._features(x, taps or {}, packed, stop=False)
        first, _, first_dropout, second, _, second_dropout, head = self.classifier
        rates = [dropout.p if self.training else 0.0 for dropout in (first_dropout, second_dropout)]
        x = self._layers.run_hidden(first, self.pool(x), rates[0], Link(False, False, packed[-2]))
        # The few logits are computed in the type of their weight in any precision: casting would take longer.
        x = self._layers.run_hidden(second, x, rates[1], Link(True, True, packed[-1]), head.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return head(x), made

    def features_at(self, x: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """The feature maps with these names (see :func:`tap_name`); nothing deeper is computed."""
        taps = dict.fromkeys(names, lambda features: (features, features))
        return self._features(x, taps, self._packed(x, self._depth(names)), stop=True)[1]

    @staticmethod
    def _depth(names: Collection[str]) -> int:
        """How many convolutions are needed for the maps with these names."""
        deepest = 0
        for kind, number in (re.fullmatch(r"(\D+)(\d*)", name).groups() for name in names):  # type: ignore[union-attr]
            if kind != "input":
                deepest = max(deepest, POOL_AFTER[int(number) - 1] if kind == "pool" else int(number))
        return deepest

    def _packed(self, x: Tensor, convs: int, hidden: bool = False) -> list[PackedWeight | None]:
        """The first weights as the kernels read them, in one launch; those of a frozen network are kept."""
        modules = [*self.convs[:convs], *([self.classifier[0], self.classifier[3]] if hidden else [])]
        weights = [module.weight for module in modules]
        if not modules or any(weight.requires_grad for weight in weights):
            return self._layers.packed(modules, self._last_map, x)
        settings = (x.dtype, autocast_dtype(x.device.type), runtime.settings(), convs, hidden)
        version = (settings, *((id(w), w._version, w.dtype, w.device) for w in weights))
        if version not in self._frozen:
            self._frozen[version] = weights, self._layers.packed(modules, self._last_map, x)
        return self._frozen[version][1]

    def _features(
        self, x: Tensor, taps: Mapping[str, Tap], packed: Sequence[PackedWeight | None], stop: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        made: dict[str, Tensor] = {}

        def tap(name: str, features: Tensor) -> Tensor:
            if name in taps:
                features, made[name] = taps[name](features)
            return features

        x = tap("input", x)
        pools, x_is_relu = 0, False
        for n, conv in enumerate(self.convs, 1):
            if stop and len(made) == len(taps):
                break
            relu, conv_name = f"relu{n}", f"conv{n}"
            pool = n in POOL_AFTER and not (stop and taps.keys() <= {*made, relu})
            # Only the next convolution reads the output: the ReLU's mask is of no cost there.
            chained = n not in POOL_AFTER and n < len(self.convs) and not taps.keys() & {relu, conv_name}
            link = Link(x_is_relu, not chained, packed[n - 1])
            if conv_name in taps:
                y, pooled = F.relu(tap(conv_name, self._layers.run(conv, x, None, link=link)[0])), None
            else:
                y, pooled = self._layers.run(conv, x, "relu", pool, relu in taps, link)
            x_is_relu = chained
            # With a fused pool nothing follows the tapped map: the convolution adds its gradient to the pool's.
            y = tap(relu, y)
            x = y if pooled is None else pooled
            if pool:
                pools += 1
                x = tap(f"pool{pools}", F.max_pool2d(y, 2) if pooled is None else pooled)
        return x, made
