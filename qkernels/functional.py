"""The public functions: validation, autocast, and the choice of what computes them."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from qkernels import runtime
from qkernels.ops._library import autocast_dtype
from qkernels.ops.gram_cosine import op as gram_op
from qkernels.ops.gram_cosine import reference as gram_reference
from qkernels.ops.hamilton_conv import op as conv_op
from qkernels.ops.hamilton_conv import reference as conv_reference
from qkernels.ops.hamilton_linear import op as linear_op
from qkernels.ops.hamilton_linear import reference as linear_reference

Pair = tuple[int, int]
ACTIVATIONS = (None, "relu")
POOLS = (None, 2)
REDUCTIONS = ("mean", "none", "sum")
SEMANTICS = ("paper", "folded-rowwise")
CLAMPS = ("each", "product")


@overload
def hamilton_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    stride: int | Pair = ...,
    padding: int | Pair = ...,
    dilation: int | Pair = ...,
    groups: int = ...,
    *,
    activation: str | None = ...,
    pool: int | None = ...,
    tap: Literal[False] = ...,
) -> Tensor: ...


@overload
def hamilton_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    stride: int | Pair = ...,
    padding: int | Pair = ...,
    dilation: int | Pair = ...,
    groups: int = ...,
    *,
    activation: str | None = ...,
    pool: int | None = ...,
    tap: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def hamilton_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    pool: int | None = None,
    tap: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Quaternion convolution, y = pool(activation(weight (x) x + bias)), a Hamilton product from the left.

    Args:
        x: `[B, 4 Q, H, W]`, channels planar `[r | i | j | k]`.
        weight: `[4, P, Q/groups, kh, kw]`, components r, i, j, k first.
        bias: `[4 P]`.
        stride, padding, dilation: pixels, one number or (vertical, horizontal).
        groups: groups of the quaternion channels, each component alike.
        activation: None or "relu".
        pool: None, or 2 for the maxima of 2x2 windows, as `torch.nn.functional.max_pool2d(y, 2)`.
        tap: with a pool, return the map in front of it too.

    Returns:
        `[B, 4 P, Ho, Wo]`, or the pooled `[B, 4 P, Ho // 2, Wo // 2]`; with `tap` both, (map, pooled). On the Triton
        backend dense NHWC (`torch.channels_last`), else contiguous.

    Raises:
        ValueError: shapes, types or options that do not fit.

    Notes:
        Casts under autocast as `torch.nn.functional.conv2d` does. Saved for the backward: x, weight, and the output
        where there is a ReLU; with a pool on the Triton backend, one byte for each of its outputs instead of the map.
        Differentiable to any order; on the Triton backend behind a ReLU or pool to the first.

        On the Triton backend sums are in float32, results the same in every run, and float32 operands are multiplied
        as such unless PyTorch's switch for convolutions allows tf32 (`torch.backends.cudnn.allow_tf32`, which PyTorch
        sets by default), to which they are rounded.

    >>> x = torch.zeros(1, 4, 2, 2)
    >>> x[:, 2] = 1  # j
    >>> i = torch.tensor([0.0, 1.0, 0.0, 0.0]).view(4, 1, 1, 1, 1)
    >>> hamilton_conv2d(x, i)[0, :, 0, 0]  # i j = k
    tensor([0., 0., 0., 1.])

    (WASPAA 2023, section 2.1; Gaudet & Maida 2018.)
    """
    stride, padding, dilation = _window(stride, padding, dilation)
    _check_rank("x", x, ("B", "4 Q", "H", "W"))
    _check_rank("weight", weight, ("4", "P", "Q/groups", "kh", "kw"))
    _check_groups(groups, weight.shape[1])
    _check_channels(x.shape[1], 4 * weight.shape[2] * groups, "4 * weight.shape[2] * groups")
    _check_bias(bias, 4 * weight.shape[1])
    _check_option("activation", activation, ACTIVATIONS)
    _check_option("pool", pool, POOLS)
    if tap and not pool:
        raise ValueError("tap=True needs pool=2: without a pool the map is what is returned")
    size = [
        conv_reference.conv_output_size(*sizes)
        for sizes in zip(x.shape[2:], weight.shape[3:], stride, padding, dilation, strict=True)
    ]
    _check_output_size([length // pool for length in size] if pool else size, x)
    x, weight, bias = _same_type(x, weight, bias)
    backend, form = runtime.plan_of("hamilton_conv2d", x, weight)
    relu, window = activation == "relu", (stride, padding, dilation, groups)
    if pool and backend == "triton":
        pooled, _, y = conv_op.hamilton_conv2d_pool(x, weight, bias, *window, relu, tap, form)
        return (y, pooled) if tap else pooled
    if backend == "reference":
        y = conv_reference.hamilton_conv2d(x, weight, bias, *window)
        y = y.relu() if relu else y
    else:
        y = conv_op.hamilton_conv2d(x, weight, bias, *window, relu, backend, form)
    if not pool:
        return y
    pooled = torch.nn.functional.max_pool2d(y, pool)
    return (y, pooled) if tap else pooled


def hamilton_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    output_padding: int | Pair = 0,
    groups: int = 1,
    dilation: int | Pair = 1,
) -> Tensor:
    """Transposed quaternion convolution: the exact adjoint of `hamilton_conv2d` with that weight, plus bias.

    As an adjoint it multiplies by the conjugate of the weight from the left; negate the components i, j, k of
    the weight for the plain Hamilton product.

    Args:
        x: `[B, 4 Q, H, W]`, channels planar `[r | i | j | k]`.
        weight: `[4, Q, P/groups, kh, kw]`.
        bias: `[4 P]`.
        stride, padding, output_padding, dilation: pixels, one number or (vertical, horizontal).
        groups: groups of the quaternion channels, each component alike.

    Returns:
        `[B, 4 P, Ho, Wo]`, dense NHWC on the Triton backend, else contiguous; Ho = (H - 1) stride - 2 padding +
        dilation (kh - 1) + output_padding + 1.

    Raises:
        ValueError: shapes, types or options that do not fit.

    (RH-Emo's decoder, Guizzo et al. 2022.)
    """
    stride, padding, dilation = _window(stride, padding, dilation)
    output_padding = _pair("output_padding", output_padding, 0)
    _check_rank("x", x, ("B", "4 Q", "H", "W"))
    _check_rank("weight", weight, ("4", "Q", "P/groups", "kh", "kw"))
    _check_groups(groups, weight.shape[1])
    _check_channels(x.shape[1], 4 * weight.shape[1], "4 * weight.shape[1]")
    _check_bias(bias, 4 * weight.shape[2] * groups)
    for extra, s, d in zip(output_padding, stride, dilation, strict=True):
        if extra >= max(s, d):
            raise ValueError(
                f"output_padding must be smaller than stride or dilation; got {output_padding} "
                f"with stride {stride} and dilation {dilation}"
            )
    size = [
        conv_reference.transposed_output_size(*sizes)
        for sizes in zip(x.shape[2:], weight.shape[3:], stride, padding, dilation, output_padding, strict=True)
    ]
    _check_output_size(size, x)
    x, weight, bias = _same_type(x, weight, bias)
    backend, form = runtime.plan_of("hamilton_conv_transpose2d", x, weight)
    if backend == "reference":
        return conv_reference.hamilton_conv_transpose2d(
            x, weight, bias, stride, padding, output_padding, groups, dilation
        )
    window = (stride, padding, dilation, groups)
    return conv_op.hamilton_conv2d_dx(x, None, None, None, weight, bias, size, *window, backend, form)


def hamilton_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """Quaternion linear map, y = activation(weight (x) x + bias), a Hamilton product from the left.

    Args:
        x: `[..., 4 K]`, features planar `[r | i | j | k]`.
        weight: `[4, N, K]`.
        bias: `[4 N]`.
        activation: None or "relu".

    Returns:
        `[..., 4 N]`.

    Raises:
        ValueError: shapes, types or options that do not fit.

    Notes:
        Casts under autocast as `torch.nn.functional.linear` does. Differentiable to any order; on the Triton backend
        behind a ReLU to the first. There float32 follows PyTorch's switch for matrix products
        (`torch.backends.cuda.matmul.allow_tf32`, off by default).

    (WASPAA 2023, section 2.1; Parcollet et al. 2019.)
    """
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, [..., 4 K]; got a scalar")
    _check_rank("weight", weight, ("4", "N", "K"))
    _check_channels(x.shape[-1], 4 * weight.shape[2], "4 * weight.shape[2]")
    _check_bias(bias, 4 * weight.shape[1])
    _check_option("activation", activation, ACTIVATIONS)
    x, weight, bias = _same_type(x, weight, bias)
    backend, form = runtime.plan_of("hamilton_linear", x, weight)
    if backend == "reference":
        y = linear_reference.hamilton_linear(x, weight, bias)
        return y.relu() if activation else y
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = linear_op.hamilton_linear(rows, weight, bias, activation == "relu", backend, form)
    return y.view(*x.shape[:-1], y.shape[1])


def gram_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the Gram matrices G = F F^T of two feature maps, per sample: <G_a, G_b> / (|G_a| |G_b|).

    Args:
        a: `[B, C, *spatial]`, any strides.
        b: `[B, C, *spatial]`.

    Returns:
        `[B]` in [0, 1], in float32 (float64 for float64 features), under autocast too. An all-zero sample has
        cosine 0 and gradient 0; NaN gives NaN.

    Raises:
        ValueError: shapes or types that do not fit.

    Notes:
        The Gram matrices are those of the channels or of the positions, whichever are smaller: the three
        scalars that are needed are the same. Samples are scaled by a power of two first, so features of any
        size do. Saved for the backward: a, b, five scalars a sample. A second derivative needs the backend
        "reference".

    >>> a = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # G = I
    >>> gram_cosine(a, torch.tensor([[[5.0, 0.0], [0.0, 0.0]]]))  # 1 / sqrt(2)
    tensor([0.7071])

    (WASPAA 2023, equation 1; Guizzo et al. 2021.)
    """
    _check_features(a, b, "a", "b")
    if runtime.backend_of("gram_cosine", a, b) == "reference":
        return _in_float32(gram_reference.gram_cosine, a, b)
    return gram_op.gram_cosine(a, b)[0]


def anti_transfer_loss(
    trained: Tensor,
    frozen: Tensor,
    *,
    beta: float = 1.0,
    reduction: str = "mean",
    semantics: str = "paper",
    clamp: str = "each",
) -> Tensor:
    """Anti-transfer loss, beta cos^2 of the Gram matrices: the similarity to the frozen network's features.

    Args:
        trained: `[B, C, *spatial]`, features of the network in training.
        frozen: `[B, C, *spatial]`, features of the frozen network of the orthogonal task.
        beta: weight of the loss.
        reduction: "mean", "none" or "sum" over the batch.
        semantics: "paper" is one cosine per sample. "folded-rowwise" is what the released research code
            computes: the batch is folded into the channels, the absolute cosines of the rows of one (B C) x
            (B C) Gram matrix are averaged and then squared, beta is applied twice; one scalar per batch.
        clamp: of "folded-rowwise" only: "each" clamps each row norm at 1e-8 (torch >= 1.12), "product" the
            product of two (torch 1.7, with which the paper's code ran).

    Returns:
        A scalar, or `[B]` for reduction "none"; float32 (float64 for float64 features), under autocast too.

    Raises:
        ValueError: shapes, types or options that do not fit; reduction "none" with "folded-rowwise"; clamp
            with "paper".

    >>> f = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> anti_transfer_loss(f, f, beta=0.5)
    tensor(0.5000)

    (WASPAA 2023, equation 1.)
    """
    _check_features(trained, frozen, "trained", "frozen")
    _check_loss_options(reduction, semantics, clamp)
    if semantics == "folded-rowwise":
        return beta**2 * _in_float32(gram_reference.folded_rowwise, trained, frozen, clamp)
    loss = beta * gram_cosine(trained, frozen).square()
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _in_float32(function: Any, a: Tensor, b: Tensor, *args: Any) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    if autocast_dtype(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return function(a, b, *args)
    return function(a, b, *args)


def _same_type(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts as autocast does for torch's own convolutions, all but float64; then all must be of one type and device."""
    dtype = autocast_dtype(x.device.type)
    if dtype:
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must be of a floating-point type; got {x.dtype}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != x.dtype:
            raise ValueError(f"{name} must have the type of x; got {other.dtype} and {x.dtype}")
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on the device of x; got {other.device} and {x.device}")
    return x, weight, bias


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _pair(name: str, value: int | Pair, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name} must be an integer >= {least} or a pair of them; got {value!r}")
    return pair


def _window(stride: int | Pair, padding: int | Pair, dilation: int | Pair) -> tuple[Pair, Pair, Pair]:
    return _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)


def _check_option(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def _check_loss_options(reduction: str, semantics: str, clamp: str) -> None:
    _check_option("reduction", reduction, REDUCTIONS)
    _check_option("semantics", semantics, SEMANTICS)
    _check_option("clamp", clamp, CLAMPS)
    if semantics == "folded-rowwise" and reduction == "none":
        raise ValueError("reduction 'none' has no meaning for semantics 'folded-rowwise': it is one scalar per batch")
    if semantics == "paper" and clamp != "each":
        raise ValueError(f"clamp {clamp!r} needs semantics 'folded-rowwise': 'paper' clamps nothing")


def _check_rank(name: str, value: Tensor, layout: tuple[str, ...]) -> None:
    if value.dim() != len(layout) or (name == "weight" and (value.shape[0] != 4 or 0 in value.shape)):
        raise ValueError(f"{name} must have shape [{', '.join(layout)}]; got {tuple(value.shape)}")


def _check_groups(groups: int, channels: int) -> None:
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide the {channels} quaternion channels of weight.shape[1]; got {groups}")


def _check_channels(size: int, expected: int, formula: str) -> None:
    if size % 4:
        raise ValueError(f"x must have a number of channels divisible by 4 (r, i, j, k); got {size}")
    if size != expected:
        raise ValueError(f"x must have {expected} = {formula} channels; got {size}")


def _check_bias(bias: Tensor | None, size: int) -> None:
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != size):
        raise ValueError(f"bias must have shape ({size},); got {tuple(bias.shape)}")


def _check_output_size(size: list[int], x: Tensor) -> None:
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"the output would be empty, {size[0]} x {size[1]} pixels, for x of shape {tuple(x.shape)}")


def _check_features(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
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
