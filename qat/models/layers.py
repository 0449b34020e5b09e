"""Layers of the real and the quaternion domain with one interface, so that VGG16 is written once for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.config import NetworkConfig
from qkernels import PackedWeight, hamilton_conv2d, hamilton_linear, pack_weights
from qkernels.init import quaternion_he_
from qkernels.nn import QuaternionConv2d, QuaternionLinear

M = TypeVar("M", bound=nn.Module)


class Link(NamedTuple):
    """Work that a quaternion layer shares with its neighbours, see `qkernels.hamilton_conv2d`; real layers ignore it.

    Args:
        x_is_relu: apply the mask of the ReLU before this layer to the gradient of its input.
        mask_gradient: apply the mask of this layer's own ReLU; False leaves it to the next layer.
        packed: weight as the layer's products read it.
    """

    x_is_relu: bool = False
    mask_gradient: bool = True
    packed: PackedWeight | None = None


UNLINKED = Link()


@dataclass(frozen=True)
class Layers:
    """Constructors and functions of the layers of one domain.

    Args:
        conv: ``(in_channels, out_channels) -> module``: initialised 3x3 convolution with padding 1.
        hidden: ``(in_features, out_features) -> (module, module)``: initialised linear layer and its ReLU, which is an
            identity if the layer includes it.
        head: ``(in_features, out_features) -> module``: last layer, real in every domain.
        run: ``(module, x, activation, pool, return_map, link) -> (y, pooled)``: convolution with activation
            ``"relu"`` or ``None``. ``pooled`` is the output of a fused 2x2 max pool, if ``pool`` is set and the layer
            can fuse it, else ``None``; y is then ``None`` unless ``return_map`` is set.
        run_hidden: ``(module, x, dropout, link, dtype) -> y``: hidden layer with ReLU and dropout, on features `[B, K]`
            or flattened maps `[B, C, H, W]`; ``dtype`` is the type of y, by default that of the computation.
        packed: ``(modules, maps, x) -> weights``: weights of convolutions and hidden layers as the products read them;
            ``maps`` are the sizes of the modules' inputs.
    """

    conv: Callable[[int, int], nn.Module]
    hidden: Callable[[int, int], tuple[nn.Module, nn.Module]]
    head: Callable[[int, int], nn.Module]
    run: Callable[..., tuple[Any, Any]]
    run_hidden: Callable[..., Tensor]
    packed: Callable[..., list[PackedWeight | None]]


def placed(module: M, device: torch.device) -> M:
    """The module on the device; on a GPU, real convolutions get weights in NHWC, the layout of tensor cores."""
    if device.type == "cuda":
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module.to(device)


def layers_of(config: NetworkConfig) -> Layers:
    """The layers of ``config.domain`` with the initialisation ``config.init``."""
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
        module: nn.Module,
        x: Tensor,
        activation: str | None,
        pool: bool = False,
        return_map: bool = False,
        link: Link = UNLINKED,
    ) -> tuple[Tensor | None, Tensor | None]:
        assert isinstance(module, QuaternionConv2d)
        if link.packed is not None and link.packed.is_real:
            y = F.conv2d(_masked(x, link), link.packed.tiles, module.bias, padding=1)
            y = y.relu_() if activation else y
            return (y if return_map or not pool else None), (F.max_pool2d(y, 2) if pool else None)
        arguments = (x, module.weight, module.bias, 1, 1)
        options: dict[str, Any] = dict(zip(Link._fields, link, strict=True), activation=activation)
        if pool and return_map:
            return hamilton_conv2d(*arguments, pool=2, return_map=True, **options)
        y = hamilton_conv2d(*arguments, pool=2 if pool else None, **options)
        return (None, y) if pool else (y, None)

    def hidden(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
        return QuaternionLinear(inputs, outputs, activation="relu"), nn.Identity()

    def run_hidden(
        module: nn.Module, x: Tensor, dropout: float, link: Link, dtype: torch.dtype | None = None
    ) -> Tensor:
        assert isinstance(module, QuaternionLinear)
        if link.packed is not None and link.packed.is_real:
            y = F.linear(_masked(x, link).flatten(1), link.packed.tiles, module.bias).relu_()
            return (F.dropout(y, dropout) if dropout else y).to(dtype or y.dtype)
        options: dict[str, Any] = {"dropout": dropout, "flatten": x.dim() == 4, "dtype": dtype, **link._asdict()}
        return hamilton_linear(x, module.weight, module.bias, activation=module.activation, **options)

    def packed(modules: Sequence[nn.Module], maps: Sequence[tuple[int, int]], x: Tensor) -> list[PackedWeight | None]:
        weights = []
        for module, size in zip(modules, maps, strict=True):
            if isinstance(module, QuaternionLinear):
                weights.append(("hamilton_linear", module.weight.unflatten(2, (-1, *size))))
            else:
                assert isinstance(module, QuaternionConv2d)
                weights.append(("hamilton_conv2d", module.weight))
        return pack_weights(weights, x, maps)

    return Layers(conv, hidden, nn.Linear, run, run_hidden, packed)


def _masked(x: Tensor, link: Link) -> Tensor:
    """x, with the mask of its ReLU for the gradient.

    For PyTorch's own layers, which get the real weights of quaternion layers without the checks of `qkernels`, as these
    take as long as a narrow layer.
    """
    return x.relu() if link.x_is_relu and x.requires_grad and torch.is_grad_enabled() else x


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

    def run(module: nn.Module, x: Tensor, activation: str | None, *_: Any, **ignored: Any) -> tuple[Tensor, None]:
        y = module(x)
        return F.relu(y) if activation == "relu" else y, None

    def hidden(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
        return linear(inputs, outputs), nn.ReLU()

    def run_hidden(
        module: nn.Module, x: Tensor, dropout: float, link: Link, dtype: torch.dtype | None = None
    ) -> Tensor:
        y = F.relu(module(x.flatten(1)))
        return (F.dropout(y, dropout) if dropout else y).to(dtype or y.dtype)

    def packed(modules: Sequence[nn.Module], maps: Sequence[tuple[int, int]], x: Tensor) -> list[PackedWeight | None]:
        return [None] * len(modules)

    return Layers(conv, hidden, linear, run, run_hidden, packed)
