"""Checks of the arguments of public functions.

Each raises a ValueError, or a TypeError for what should be a tensor or another object: one line that names argument,
value and rule. Numbers may be NumPy's; where a check returns a value, it is that of plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qkernels.losses import Loss, told

if TYPE_CHECKING:
    from qkernels.functional import GramTarget

Pair = tuple[int, int]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LIMIT = 2**31
"""Of sizes and of an image's pixels, which kernels, PyTorch's own among them, count in 32 bits."""
SCALARS = (str, int, float, type(None), np.generic)


def instance(name: str, value: Any, kind: type, description: str) -> None:
    """None is allowed too."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} must be {description} or None; got {told(value)}")


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {told(value)}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor; got one of layout {value.layout}")


def floating(name: str, dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        kinds = "float16, bfloat16, float32 or float64"
        raise ValueError(f"{name} must be of a floating-point type; got {told(dtype)}, which is not {kinds}")


def option(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """The one of `allowed` that equals the value."""
    if not isinstance(value, SCALARS) or value not in allowed:  # arrays and tensors compare by element
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {told(value)}")
    return allowed[allowed.index(value)]


def flag(name: str, value: Any) -> bool:
    """A truth value; 1 and 0 stand for it, as everywhere in Python."""
    return value if value is True or value is False else bool(option(name, value, (False, True)))


def number(name: str, value: Any, rule: str, least: int | None = None, most: int | None = None) -> float:
    """A finite number as a float."""
    plain = value if type(value) is float else _plain(value)
    # Literals: floats of the module or of a signature would be numbers to torch.compile that may change.
    if type(plain) not in (int, float) or not -1e308 <= plain <= 1e308:
        raise ValueError(f"{name} must be {rule}; got {told(value)}")
    if (least is not None and plain < least) or (most is not None and plain > most):
        raise ValueError(f"{name} must be {rule}; got {told(value)}")
    return float(plain)


def count(name: str, value: Any) -> int:
    value = _plain(value)
    if not _is_size(value, 1):
        raise ValueError(f"{name} must be an integer >= 1; got {told(value)}")
    return int(value)


def pair(name: str, value: int | Sequence[int], least: int) -> Pair:
    """A pair, or one number for both axes, as a pair."""
    if type(value) is int and least <= value < LIMIT:  # almost always: small layers notice the time of a check
        return value, value
    if type(value) is not tuple:
        value = _plain(value)
    numbers = tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else (value, value)
    if len(numbers) != 2 or not (_is_size(numbers[0], least) and _is_size(numbers[1], least)):
        raise ValueError(f"{name} must be an integer >= {least} or a pair of them; got {told(value)}")
    if max(numbers) >= LIMIT:
        raise ValueError(f"{name} must be smaller than 2**31; got {told(value)}")
    return numbers


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _is_size(value: Any, least: int) -> bool:
    """Whether it is an integer of at least this; True is none, but an argument that was meant for another place."""
    return isinstance(value, int) and value is not True and value is not False and value >= least


def window(stride: int | Pair, padding: int | Pair, dilation: int | Pair) -> tuple[Pair, Pair, Pair]:
    return pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)


def rank(name: str, value: Tensor, layout: tuple[str, ...]) -> None:
    tensor(name, value)
    if value.dim() != len(layout) or (name == "weight" and (value.shape[0] != 4 or 0 in value.shape)):
        raise ValueError(f"{name} must have shape [{', '.join(layout)}]; got {tuple(value.shape)}")


def groups(value: int, quaternions: int) -> int:
    if type(value) is not int:
        value = count("groups", value)
    if value < 1 or quaternions % value:
        raise ValueError(f"groups must divide the {quaternions} quaternion channels of weight.shape[1]; got {value}")
    return value


def quaternions(name: str, channels: int, groups: int = 1) -> int:
    """Number of quaternion channels in this number of real channels."""
    channels = _plain(channels)
    if not _is_size(channels, 4) or channels % (4 * groups):
        rule = "4" if groups == 1 else f"4 * groups = {4 * groups}"
        raise ValueError(f"{name} must be a positive multiple of {rule}; got {told(channels)}")
    if channels >= LIMIT:
        raise ValueError(f"{name} must be smaller than 2**31; got {told(channels)}")
    return channels // 4


def factory(shape: tuple[int, ...], device: Any, dtype: Any) -> None:
    """Whether parameters of this shape, device and type can be."""
    if math.prod(shape) >= LIMIT:
        raise ValueError(f"the weight must have fewer than 2**31 elements; its shape would be {shape}")
    if dtype is not None:
        floating("dtype", dtype)
    try:
        torch.empty(0, device=device)
    except (TypeError, ValueError, RuntimeError, AssertionError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that PyTorch has here; got {told(device)} ({reason})") from error


def generator(value: torch.Generator | None) -> None:
    instance("generator", value, torch.Generator, "a torch.Generator")


def initialised(weight: Tensor) -> None:
    """What can be filled with quaternions."""
    tensor("weight", weight)
    if weight.dim() < 3 or weight.shape[0] != 4 or weight.numel() == 0:
        raise ValueError(f"weight must have shape [4, out/4, in/4, *kernel]; got {tuple(weight.shape)}")
    floating("weight", weight.dtype)
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        raise ValueError(f"weight must have memory of its own for each element; got strides {weight.stride()}")


def channels(count: int, expected: int, formula: str) -> None:
    if count % 4:
        raise ValueError(f"x must have a number of channels divisible by 4 (r, i, j, k); got {count}")
    if count != expected:
        raise ValueError(f"x must have {expected} = {formula} channels; got {count}")


def features_of(x: Tensor, flatten: bool) -> int:
    """Number of input features of a linear map."""
    tensor("x", x)
    if flatten and (x.dim() != 4 or x.shape[1] % 4):
        raise ValueError(f"x must have shape [B, 4 Q, H, W] with flatten=True; got {tuple(x.shape)}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, [..., 4 K]; got a scalar")
    return x.shape[1:].numel() if flatten else x.shape[-1]


def layers(weights: Any) -> None:
    """The names and weights of layers."""
    rule = "weights must be a sequence of pairs of a function's name and its weight"
    if not isinstance(weights, Sequence):
        raise TypeError(f"{rule}; got {told(weights)}")
    for entry in weights:
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            raise TypeError(f"{rule}; got {told(entry)} among them")
        tensor("weight", entry[1])
        if entry[1].dim() not in (3, 5) or entry[1].shape[0] != 4 or 0 in entry[1].shape:
            shapes = "[4, P, Q, kh, kw] or [4, N, K]"
            raise ValueError(f"weight must have shape {shapes}; got {tuple(entry[1].shape)} for {told(entry[0])}")


def sizes(values: Any, count: int) -> list[Pair]:
    """Height and width of the inputs of so many layers."""
    if not isinstance(values, Sequence) or len(values) != count:
        raise ValueError(f"sizes must be {count} pairs, one for each weight; got {told(values)}")
    return [pair("sizes", size, 1) for size in values]


def numbers(index: Tensor, values: Tensor) -> None:
    """Numbers of samples. Their range is not known on a GPU without waiting for it, nor where they have no values."""
    tensor("index", index)
    count = values.shape[0]
    if index.device != values.device:
        raise ValueError(f"index must be on the device of values; got {index.device} and {values.device}")
    if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"index must be integers [b]; got {index.dtype} of shape {tuple(index.shape)}")
    if torch.compiler.is_compiling() or type(index) is not Tensor or index.device.type != "cpu":
        return
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(f"index must hold numbers of the {count} samples, from 0; got {told(index.tolist())}")


def bias(value: Tensor | None, size: int) -> None:
    if value is None:
        return
    tensor("bias", value)
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"bias must have shape ({size},); got {tuple(value.shape)}")


def output_size(size: Sequence[int], x: Tensor) -> None:
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"the output would be empty, {size[0]} x {size[1]} pixels, for x of shape {tuple(x.shape)}")
    if size[0] * size[1] >= LIMIT:
        raise ValueError(
            f"the output must have fewer than 2**31 pixels; it would have {size[0]} x {size[1]} for x of shape "
            f"{tuple(x.shape)}"
        )
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must have at least one pixel; got shape {tuple(x.shape)}")


def features(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    tensor(name_a, a)
    tensor(name_b, b)
    if a.dim() < 2:
        raise ValueError(f"{name_a} must have dimensions [B, C, *spatial]; got shape {tuple(a.shape)}")
    if a.shape != b.shape:
        raise ValueError(f"{name_b} must have the shape of {name_a}; got {tuple(b.shape)} and {tuple(a.shape)}")
    if a.shape[1:].numel() == 0:
        raise ValueError(f"{name_a} must have at least one channel and one position; got shape {tuple(a.shape)}")
    floating(name_a, a.dtype)
    floating(name_b, b.dtype)
    if a.device != b.device:
        raise ValueError(f"{name_b} must be on the device of {name_a}; got {b.device} and {a.device}")


def loss_options(loss: Loss, reduction: str, source: torch.Generator | None) -> None:
    option("reduction", reduction, ("mean", "none", "sum"))
    if reduction == "none" and not loss.per_sample:
        raise ValueError(f"reduction must be 'mean' or 'sum' with {loss!r}, one value per batch; got 'none'")
    generator(source)
    if source is not None and getattr(loss, "aggregation", None) != "stochastic_pairwise":
        raise ValueError(f"generator must be None without aggregation 'stochastic_pairwise'; got one with {loss!r}")


def parts(prefix: str, target: GramTarget) -> None:
    """The tensors of a target among each other."""
    values, stats = target.values, target.stats
    tensor(f"{prefix}values", values)
    tensor(f"{prefix}stats", stats)
    flag(f"{prefix}triangles", target.triangles)
    if values.dim() < 2:
        raise ValueError(f"{prefix}values must have dimensions [B, ...]; got shape {tuple(values.shape)}")
    if stats.shape != (2, values.shape[0]):
        raise ValueError(f"{prefix}stats must have shape {(2, values.shape[0])}; got {tuple(stats.shape)}")
    floating(f"{prefix}values", values.dtype)
    floating(f"{prefix}stats", stats.dtype)
    if stats.device != values.device:
        raise ValueError(f"{prefix}stats must be on the device of values; got {stats.device} and {values.device}")


def target(trained: Tensor, frozen: GramTarget, name: str, loss: Loss) -> None:
    features(trained, trained, name, name)
    parts("frozen.", frozen)
    if frozen.loss != loss:
        raise ValueError(f"frozen must be features or a target of {loss!r}; got one of {frozen.loss!r}")
    expected = trained.shape
    if frozen.triangles:
        rows = trained.shape[1] if frozen.loss.name == "gram-channel" else trained.shape[2:].numel()
        expected = torch.Size((trained.shape[0], rows * (rows + 1) // 2))
    if frozen.values.shape != expected:
        raise ValueError(
            f"frozen.values must have shape {tuple(expected)} for {name} of shape {tuple(trained.shape)}; got "
            f"{tuple(frozen.values.shape)}"
        )
    if frozen.values.device != trained.device:
        raise ValueError(f"frozen must be on the device of {name}; got {frozen.values.device} and {trained.device}")
