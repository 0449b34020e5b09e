"""VGG16 in the real and the quaternion domain, with taps on its features (WASPAA 2023, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.config import NetworkConfig
from qat.models.layers import Link, layers_of
from qkernels import PackedWeight, runtime
from qkernels.runtime.precision import autocast_dtype

Tap = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps features `[B, C, H, W]` to the next layer's input and a value that is returned with the logits."""

LAYERS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
"""The 3x3 convolutions by their output channels, and 2x2 max pools "M" (Simonyan and Zisserman, configuration D)."""
HIDDEN = 4096
INPUT = {"quaternion": (4, 64, 64), "real": (1, 512, 128), "real-on-embedding": (4, 64, 64)}

CHANNELS = tuple(layer for layer in LAYERS if isinstance(layer, int))
POOL_AFTER = tuple(i - LAYERS[:i].count("M") for i, layer in enumerate(LAYERS) if layer == "M")
"""Numbers, from 1, of the convolutions before a pool."""

_POOLS_BEFORE = tuple(sum(after < n for after in POOL_AFTER) for n in range(1, len(CHANNELS) + 1))
"""Number of pools in front of each convolution."""

_DEPTH = {"input": 0} | {f"{kind}{n}": n for n in range(1, len(CHANNELS) + 1) for kind in ("conv", "relu")}
_DEPTH |= {f"pool{k}": n for k, n in enumerate(POOL_AFTER, 1)}
"""Number of convolutions before each feature map; of maps with the same number, the next convolution reads the last."""


def tap_name(layer: int, position: str) -> str:
    """Name of the feature map that "layer n" stands for.

    Args:
        layer: convolution 1..13.
        position: ``relu``, ``pre-relu``, ``slice`` or ``pool5``; see :class:`qat.config.AntiTransferConfig`.

    Raises:
        ValueError: the layer is not one of VGG16's thirteen convolutions.

    >>> tap_name(2, "relu"), tap_name(3, "slice"), tap_name(4, "slice")
    ('relu2', 'pool1', 'relu3')
    """
    if not 1 <= layer <= len(CHANNELS):
        raise ValueError(f"anti_transfer.layers: layer {layer} does not exist; VGG16 has convolutions 1 to 13")
    # The older anti-transfer code evaluates "layer n" up to, not including, convolution n.
    input_of_layer = [name for name, depth in _DEPTH.items() if depth == layer - 1][-1]
    return {"relu": f"relu{layer}", "pre-relu": f"conv{layer}", "slice": input_of_layer, "pool5": "pool5"}[position]


def scaled(channels: int, width: float) -> int:
    """``channels * width`` as a positive multiple of 4, so that every width fits quaternions.

    >>> scaled(64, 1 / 8), scaled(64, 0.01)
    (8, 4)
    """
    return max(4, 4 * round(channels * width / 4))


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions, each with ReLU, five 2x2 max pools, three linear layers; no batch norm.

    Args:
        config: settings of the network.
        num_classes: number of logits K.

    A frozen network keeps its weights as the products read them, until one changes in place or is replaced; changes in
    place through ``weight.data`` cannot be seen.

    Shapes: input `[B, 4, 64, 64]` (embedding domains) or `[B, 1, 512, 128]` (real), output logits `[B, K]`.
    The last linear layer is real in every domain.
    """

    def __init__(self, config: NetworkConfig, num_classes: int) -> None:
        super().__init__()
        layers = layers_of(config)
        self._layers = layers
        # NHWC is faster for few channels, and for pools; quaternion layers of many channels turn to NCHW themselves.
        self._nhwc_on_a_cpu = config.domain == "quaternion" or (config.embeds and config.width <= 1 / 4)
        channels, height, width = INPUT[config.domain]
        # Packed weights by settings and by the versions of the weights, which are stored with them, so that their ids
        # stay unique. On a GPU entries are never removed: a CUDA graph may read them.
        self._kept: dict[Any, tuple[list[Tensor], list[PackedWeight | None]]] = {}
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
        """Logits `[B, K]` and the value of each tap, from one forward pass.

        Args:
            x: input.
            taps: taps by the name of their feature map (see :func:`tap_name`).
        """
        packed = self._packed(x, len(self.convs), hidden=True)
        x, tapped = self._features(x, taps or {}, packed[: len(self.convs)])
        first, _, first_dropout, second, _, second_dropout, head = self.classifier
        rates = [dropout.p if self.training else 0.0 for dropout in (first_dropout, second_dropout)]
        x = self._layers.run_hidden(first, self.pool(x), rates[0], Link(False, False, packed[-2]))
        # The few logits are computed in the type of their weight, whatever the precision: casting would take longer.
        x = self._layers.run_hidden(second, x, rates[1], Link(True, True, packed[-1]), head.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return head(x), tapped

    def features_at(self, x: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """The feature maps with these names (see :func:`tap_name`); nothing deeper is computed."""
        taps = dict.fromkeys(names, lambda features: (features, features))
        depth = max((_DEPTH[name] for name in names), default=0)
        last_pool = any(name.startswith("pool") for name in names if _DEPTH[name] == depth)
        return self._features(x, taps, self._packed(x, depth), last_pool)[1]

    def _packed(self, x: Tensor, convs: int, hidden: bool = False) -> list[PackedWeight | None]:
        """Weights of the first ``convs`` convolutions, and of the hidden layers, as the products read them.

        On a GPU they are packed in one launch; those of a frozen network only once. Others are packed each time, with
        gradients and without: not every optimiser that changes a weight raises its version.
        """
        modules = [*self.convs[:convs], *([self.classifier[0], self.classifier[3]] if hidden else [])]
        weights, on_cpu = [module.weight for module in modules], x.device.type == "cpu"
        if on_cpu and torch.compiler.is_compiling():
            return [None] * len(modules)
        if any(weight.requires_grad or weight.is_inference() for weight in weights):  # the latter have no version
            return self._layers.packed(modules, self._maps(x, convs, hidden), x)
        size = x.shape[2:] if on_cpu else None  # by which plain PyTorch chooses its forms
        mode = torch.is_inference_mode_enabled(), autocast_dtype(x.device.type), runtime.settings()
        places = ((id(w), w._version, w.untyped_storage()._cdata, w.dtype, w.device) for w in weights)
        version = (x.dtype, size, mode, convs, hidden, *places)
        kept = self._kept.get(version)
        if kept is None:
            kept = weights, self._layers.packed(modules, self._maps(x, convs, hidden), x)
            if on_cpu:
                self._kept.clear()
            if any(kept[1]):
                self._kept[version] = kept
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed weights, which belong to the weights of this network and not of its copy."""
        return {**self.__dict__, "_kept": {}}

    def _maps(self, x: Tensor, convs: int, hidden: bool) -> list[tuple[int, int]]:
        """Height and width of the inputs of the first ``convs`` convolutions, and of the hidden layers."""
        maps = [(x.shape[2] >> k, x.shape[3] >> k) for k in _POOLS_BEFORE[:convs]]
        return [*maps, self._last_map, (1, 1)] if hidden else maps

    def _features(
        self, x: Tensor, taps: Mapping[str, Tap], packed: Sequence[PackedWeight | None], last_pool: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The last feature map and the value of each tap.

        Args:
            x: input.
            taps: taps by the name of their feature map.
            packed: packed weights, one per convolution to compute.
            last_pool: whether the last convolution's output is pooled if the network has a pool there.
        """
        tapped: dict[str, Tensor] = {}

        def tap(name: str, features: Tensor) -> Tensor:
            if name in taps:
                features, tapped[name] = taps[name](features)
            return features

        x, x_is_relu = tap("input", x), False
        if x.device.type == "cpu" and self._nhwc_on_a_cpu and not runtime.needs_own_operators():
            x = x.contiguous(memory_format=torch.channels_last)
        for n, (conv, weight) in enumerate(zip(self.convs, packed, strict=False), 1):
            conv_name, relu_name = f"conv{n}", f"relu{n}"
            pool = n in POOL_AFTER and (last_pool or n < len(packed))
            # If only the next convolution reads the output, it applies the ReLU's mask at no cost. PyTorch's own layer
            # applies it itself.
            read_once = n not in POOL_AFTER and n < len(self.convs) and not taps.keys() & {conv_name, relu_name}
            chained = read_once and not (weight is not None and weight.is_real)
            link = Link(x_is_relu, not chained, weight)
            if conv_name in taps:
                y, pooled = F.relu(tap(conv_name, self._layers.run(conv, x, None, link=link)[0])), None
            else:
                y, pooled = self._layers.run(conv, x, "relu", pool, relu_name in taps, link)
            # With a fused pool, only the tap reads this map: the convolution adds its gradient to the pool's.
            x, x_is_relu = tap(relu_name, y), chained
            if pool:
                pool_name = f"pool{POOL_AFTER.index(n) + 1}"
                x = tap(pool_name, F.max_pool2d(x, 2) if pooled is None else pooled)
        return x, tapped
