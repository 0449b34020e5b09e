"""Checks of the arguments of public functions: each raises a ValueError that names argument, value and rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkernels.losses import Loss

if TYPE_CHECKING:
    from qkernels.functional import GramTarget

Pair = tuple[int, int]


def option(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def pair(name: str, value: int | Pair, least: int) -> Pair:
    """A pair, or one number for both axes, as a pair."""
    numbers = (value, value) if isinstance(value, int) else tuple(value)
    if len(numbers) != 2 or not all(isinstance(number, int) and number >= least for number in numbers):
        raise ValueError(f"{name} must be an integer >= {least} or a pair of them; got {value!r}")
    return numbers


def window(stride: int | Pair, padding: int | Pair, dilation: int | Pair) -> tuple[Pair, Pair, Pair]:
    return pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)


def rank(name: str, value: Tensor, layout: tuple[str, ...]) -> None:
    if value.dim() != len(layout) or (name == "weight" and (value.shape[0] != 4 or 0 in value.shape)):
        raise ValueError(f"{name} must have shape [{', '.join(layout)}]; got {tuple(value.shape)}")


def groups(count: int, quaternions: int) -> None:
    if count < 1 or quaternions % count:
        raise ValueError(f"groups must divide the {quaternions} quaternion channels of weight.shape[1]; got {count}")


def quaternions(name: str, channels: int, groups: int = 1) -> int:
    """Number of quaternion channels in this number of real channels."""
    if groups < 1:
        raise ValueError(f"groups must be at least 1; got {groups}")
    if channels < 4 or channels % (4 * groups):
        rule = "4" if groups == 1 else f"4 * groups = {4 * groups}"
        raise ValueError(f"{name} must be a positive multiple of {rule}; got {channels}")
    return channels // 4


def channels(count: int, expected: int, formula: str) -> None:
    if count % 4:
        raise ValueError(f"x must have a number of channels divisible by 4 (r, i, j, k); got {count}")
    if count != expected:
        raise ValueError(f"x must have {expected} = {formula} channels; got {count}")


def features_of(x: Tensor, flatten: bool) -> int:
    """Number of input features of a linear map."""
    if flatten and (x.dim() != 4 or x.shape[1] % 4):
        raise ValueError(f"x must have shape [B, 4 Q, H, W] with flatten=True; got {tuple(x.shape)}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, [..., 4 K]; got a scalar")
    return x.shape[1:].numel() if flatten else x.shape[-1]


def bias(value: Tensor | None, size: int) -> None:
    if value is not None and (value.dim() != 1 or value.shape[0] != size):
        raise ValueError(f"bias must have shape ({size},); got {tuple(value.shape)}")


def output_size(size: Sequence[int], x: Tensor) -> None:
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"the output would be empty, {size[0]} x {size[1]} pixels, for x of shape {tuple(x.shape)}")


def features(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    if a.dim() < 2:
        raise ValueError(f"{name_a} must have dimensions [B, C, *spatial]; got shape {tuple(a.shape)}")
    if a.shape != b.shape:
        raise ValueError(f"{name_b} must have the shape of {name_a}; got {tuple(b.shape)} and {tuple(a.shape)}")
    if a.shape[1:].numel() == 0:
        raise ValueError(f"{name_a} must have at least one channel and one position; got shape {tuple(a.shape)}")
    for name, value in ((name_a, a), (name_b, b)):
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} must be of a floating-point type; got {value.dtype}")
    if a.device != b.device:
        raise ValueError(f"{name_b} must be on the device of {name_a}; got {b.device} and {a.device}")


def loss_options(loss: Loss, reduction: str, generator: torch.Generator | None) -> None:
    option("reduction", reduction, ("mean", "none", "sum"))
    if reduction == "none" and not loss.per_sample:
        raise ValueError(f"reduction must be 'mean' or 'sum' with {loss!r}, one value per batch; got 'none'")
    if generator is not None and getattr(loss, "aggregation", None) != "stochastic_pairwise":
        raise ValueError(f"generator must be None without aggregation 'stochastic_pairwise'; got one with {loss!r}")


def target(trained: Tensor, frozen: GramTarget, name: str, loss: Loss) -> None:
    features(trained, trained, name, name)
    if frozen.loss != loss:
        raise ValueError(f"frozen must be features or a target of {loss!r}; got one of {frozen.loss!r}")
    expected = trained.shape
    if frozen.packed:
        rows = trained.shape[1] if frozen.loss.name == "gram-channel" else trained.shape[2:].numel()
        expected = torch.Size((trained.shape[0], rows * (rows + 1) // 2))
    if frozen.values.shape != expected:
        raise ValueError(
            f"frozen.values must have shape {tuple(expected)} for {name} of shape {tuple(trained.shape)}; got "
            f"{tuple(frozen.values.shape)}"
        )
    if frozen.values.device != trained.device:
        raise ValueError(f"frozen must be on the device of {name}; got {frozen.values.device} and {trained.device}")
