"""Sizes of VGG16's layers, for computing its arithmetic and memory traffic."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from qat.config import NetworkConfig
from qat.models.vgg import CHANNELS, HIDDEN, INPUT, POOL_AFTER, scaled


class Sizes(NamedTuple):
    """Sizes of one layer.

    Args:
        inputs, outputs: number of elements of a sample's input and output.
        weights: number of parameters.
        products: number of multiplications per output element.
        features: number of channels and of positions of the output.
    """

    inputs: int
    outputs: int
    weights: int
    products: int
    features: tuple[int, int]

    @property
    def flops(self) -> int:
        """Operations in one sample's forward pass; each of the two gradients takes as many. Biases are not counted."""
        return 2 * self.outputs * self.products


@cache
def layer_sizes(config: NetworkConfig, classes: int) -> list[Sizes]:
    """The 13 convolutions and 3 linear layers of a network, as its definition computes them."""
    c, *size = INPUT[config.domain]
    sharing = 4 if config.domain == "quaternion" else 1
    positions, sizes = math.prod(size), []
    for layer, channels in enumerate(CHANNELS, 1):
        d = scaled(channels, config.width)
        sizes.append(Sizes(c * positions, d * positions, 9 * c * d // sharing + d, 9 * c, (d, positions)))
        c, positions = d, positions // 4 if layer in POOL_AFTER else positions
    c, hidden = c * (49 if config.adaptive_pool else positions), scaled(HIDDEN, config.width)
    for d, shared in ((hidden, sharing), (hidden, sharing), (classes, 1)):
        sizes.append(Sizes(c, d, c * d // shared + d, c, (d, 1)))
        c = d
    return sizes
