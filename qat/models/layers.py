"""The layers of one number system, so that VGG16 is written once for real and quaternion networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.config import NetworkConfig
from qkernels import hamilton_conv2d
from qkernels.init import quaternion_he_
from qkernels.nn import QuaternionConv2d, QuaternionLinear

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Layers:
    """How one number system builds a 3x3 convolution and a linear layer, and runs the convolution.

    Args:
        conv: ``(in_channels, out_channels) -> module``, 3x3, padding 1, initialised.
        hidden: ``(in_features, out_features) -> (module, module)``: a linear layer, initialised, and its ReLU, which
            does nothing where it is part of the layer.
        head: ``(in_features, out_features) -> module``: the last layer, which is real in every domain.
        run: ``(module, x, activation, pool, tap) -> (y, pooled)`` with activation ``"relu"`` or ``None``; ``pooled`` is
            y behind a 2x2 max pool where that is asked for and part of the convolution, else ``None``; beside it y is
            ``None`` unless a ``tap`` needs it.
    """

    conv: Callable[[int, int], nn.Module]
    hidden: Callable[[int, int], tuple[nn.Module, nn.Module]]
    head: Callable[[int, int], nn.Module]
    run: Callable[..., tuple[Any, Any]]


def placed(module: M, device: torch.device) -> M:
    """The module on the device; on a GPU, weights of real convolutions in the layout of its tensor cores, NHWC."""
    if device.type == "cuda":
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module.to(device)


def layers_of(config: NetworkConfig) -> Layers:
    """The layers that ``config.domain`` and ``config.init`` ask for."""
    if config.domain == "quaternion":
        return _quaternion(config.init)
    return _real(config.init)


def _quaternion(init: str) -> Layers:
    def conv(inputs: int, outputs: int) -> nn.Module:
        module = QuaternionConv2d(inputs, outputs, kernel_size=3, padding=1)
        if init == "he" and not module.weight.is_meta:
            quaternion_he_(module.weight)
        return module

    def run(
        module: nn.Module, x: Tensor, activation: str | None, pool: bool = False, tap: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        assert isinstance(module, QuaternionConv2d)
        arguments = (x, module.weight, module.bias, 1, 1)
        if pool and tap:
            return hamilton_conv2d(*arguments, activation=activation, pool=2, tap=True)
        y = hamilton_conv2d(*arguments, activation=activation, pool=2 if pool else None)
        return (None, y) if pool else (y, None)

    def hidden(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
        return QuaternionLinear(inputs, outputs, activation="relu"), nn.Identity()

    return Layers(conv, hidden, nn.Linear, run)


def _real(init: str) -> Layers:
    def initialised(module: nn.Conv2d | nn.Linear) -> nn.Module:
        if init == "he":
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif init == "default" and isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif init == "default":
            nn.init.normal_(module.weight, 0.0, 0.01)
        if init != "pytorch" and module.bias is not None:
            nn.init.zeros_(module.bias)
        return module

    def conv(inputs: int, outputs: int) -> nn.Module:
        return initialised(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1))

    def linear(inputs: int, outputs: int) -> nn.Module:
        return initialised(nn.Linear(inputs, outputs))

    def run(
        module: nn.Module, x: Tensor, activation: str | None, pool: bool = False, tap: bool = False
    ) -> tuple[Tensor, None]:
        y = module(x)
        return F.relu(y) if activation == "relu" else y, None

    def hidden(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
        return linear(inputs, outputs), nn.ReLU()

    return Layers(conv, hidden, linear, run)
