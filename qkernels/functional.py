"""The public functions: they validate, cast under autocast, and choose the backend."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from qkernels import checks, runtime
from qkernels.algebra import ExpandWeights, product_weight
from qkernels.checks import Pair
from qkernels.losses import CosSquared, FoldedRowwise, Loss, MseSigmoid, loss_of
from qkernels.ops._library import compute_dtype, direct, eager, plain
from qkernels.ops.aggregation import similarity
from qkernels.ops.folded_rowwise import op as folded_op
from qkernels.ops.folded_rowwise import reference as folded_reference
from qkernels.ops.folded_rowwise.config import kernel_obstacle
from qkernels.ops.gram_cosine import op as gram_op
from qkernels.ops.gram_cosine import reference as gram_reference
from qkernels.ops.gram_cosine.config import GRAMS
from qkernels.ops.hamilton_conv import op as conv_op
from qkernels.ops.hamilton_conv import reference as conv_reference
from qkernels.ops.hamilton_conv.config import MOST_TICKETS, PLAIN_FORMS, packed_size
from qkernels.ops.hamilton_linear import op as linear_op
from qkernels.ops.hamilton_linear import reference as linear_reference
from qkernels.runtime.flops import register_formulas
from qkernels.runtime.precision import autocast_dtype

register_formulas()

ACTIVATIONS = (None, "relu")
POOLS = (None, 2)
UNIT = (1, 1, 0, 0, 1, 1, 1)
"""Stride, padding and dilation of both axes, and the groups, of a linear map as a convolution."""


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
    return_map: Literal[False] = ...,
    x_is_relu: bool = ...,
    mask_gradient: bool = ...,
    packed: PackedWeight | None = ...,
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
    return_map: Literal[True],
    x_is_relu: bool = ...,
    mask_gradient: bool = ...,
    packed: PackedWeight | None = ...,
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
    return_map: bool = False,
    x_is_relu: bool = False,
    mask_gradient: bool = True,
    packed: PackedWeight | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Quaternion convolution, y = pool(activation(weight (x) x + bias)), a Hamilton product from the left.

    Args:
        x: `[B, 4 Q, H, W]`, channels planar `[r | i | j | k]`.
        weight: `[4, P, Q/groups, kh, kw]`, components r, i, j, k first.
        bias: `[4 P]`.
        stride, padding, dilation: pixels, one number or (vertical, horizontal).
        groups: number of groups of the quaternion channels, the same for each component.
        activation: None or "relu".
        pool: None, or 2 for the maxima of 2x2 windows, as `torch.nn.functional.max_pool2d(y, 2)`.
        return_map: with a pool, return the map in front of it too.
        x_is_relu: x is the output of a ReLU, whose mask [x > 0] the gradient by x goes through as it is written.
        mask_gradient: False leaves the mask of this call's ReLU out of its backward. Every layer that reads y must then
            set `x_is_relu`, or gradients are wrong. In a chain of layers each mask is thus applied once, at no cost. In
            eager code on a CPU the form "dense" applies its own mask all the same.
        packed: result of `pack_weights` for this weight, whose form the layer takes then.

    Returns:
        `[B, 4 P, Ho, Wo]`, or the pooled `[B, 4 P, Ho // 2, Wo // 2]`; with `return_map` both, (map, pooled). On the
        Triton backend dense NHWC (`torch.channels_last`), else contiguous, except that the form "dense" keeps x's NHWC.

    Raises:
        ValueError: shapes, types or options that do not fit.

    Notes:
        Casts under autocast as `torch.nn.functional.conv2d` does, except weight and bias on the Triton backend, whose
        gradients have their own type. Saves for the backward x, weight, and the output if its ReLU's mask is needed;
        with a pool on the Triton backend one byte per output instead of the map, and the packed weight. The form
        "dense" in eager code on a CPU is PyTorch's own convolution of the expanded weight, which it saves.
        Differentiable to any order; on the Triton backend only once behind a ReLU or pool and with `x_is_relu`.

        The Triton backend sums in float32 and gives the same bits in every run. It rounds float32 operands to tf32 only
        if PyTorch's switch for convolutions allows that (`torch.backends.cudnn.allow_tf32`, on by default).

    >>> x = torch.zeros(1, 4, 2, 2)
    >>> x[:, 2] = 1  # j
    >>> i = torch.tensor([0.0, 1.0, 0.0, 0.0]).view(4, 1, 1, 1, 1)
    >>> hamilton_conv2d(x, i)[0, :, 0, 0]  # i j = k
    tensor([0., 0., 0., 1.])

    (WASPAA 2023, section 2.1; Gaudet & Maida 2018.)
    """
    stride, padding, dilation = checks.window(stride, padding, dilation)
    checks.rank("x", x, ("B", "4 Q", "H", "W"))
    checks.rank("weight", weight, ("4", "P", "Q/groups", "kh", "kw"))
    groups = checks.groups(groups, weight.shape[1])
    checks.channels(x.shape[1], 4 * weight.shape[2] * groups, "4 * weight.shape[2] * groups")
    checks.bias(bias, 4 * weight.shape[1])
    activation, pool = checks.option("activation", activation, ACTIVATIONS), checks.option("pool", pool, POOLS)
    return_map = checks.flag("return_map", return_map)
    x_is_relu, mask_gradient = checks.flag("x_is_relu", x_is_relu), checks.flag("mask_gradient", mask_gradient)
    checks.instance("packed", packed, PackedWeight, "a result of pack_weights")
    if return_map and not pool:
        raise ValueError("return_map=True needs pool=2: without a pool the map is the result itself")
    size = conv_reference.conv_output_size(x.shape[2:], weight.shape[3:], stride, padding, dilation)
    checks.output_size([length // (pool or 1) for length in size], x)
    x, weight, bias, backend, algorithm = _operands_of_layer("hamilton_conv2d", x, weight, bias, packed)
    relu, window = activation == "relu", (*stride, *padding, *dilation, groups)
    computed_by = (runtime.operator_backend(backend), algorithm)
    if pool and backend == "triton":
        arrays = _packed(packed, x, weight, algorithm)
        options = (window, relu, return_map, x_is_relu)
        pooled, _, y = conv_op.hamilton_conv2d_pool(x, weight, bias, *arrays, *options, *computed_by)
        return (y, pooled) if return_map else pooled
    if backend == "reference":
        x = x.relu() if x_is_relu else x  # changes no value, and masks the gradient
        y = conv_reference.hamilton_conv2d(x, weight, bias, stride, padding, dilation, groups)
        y = y.relu() if relu else y
    else:
        operator, x, tiles, tickets = _own(
            conv_op.hamilton_conv2d, packed, x, weight, bias, backend, algorithm, groups, x_is_relu
        )
        layer = (window, relu, 0.0, x_is_relu, mask_gradient or bool(pool), x.dtype)
        y = operator(x, weight, bias, tiles, tickets, None, *layer, *computed_by)
    if not pool:
        return y
    pooled = torch.nn.functional.max_pool2d(y, pool)
    return (y, pooled) if return_map else pooled


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
    """Transposed quaternion convolution: the exact adjoint of `hamilton_conv2d` with the same weight, plus bias.

    As an adjoint it multiplies from the left by the conjugate of the weight; negate its components i, j and k for the
    plain Hamilton product.

    Args:
        x: `[B, 4 Q, H, W]`, channels planar `[r | i | j | k]`.
        weight: `[4, Q, P/groups, kh, kw]`.
        bias: `[4 P]`.
        stride, padding, output_padding, dilation: pixels, one number or (vertical, horizontal).
        groups: number of groups of the quaternion channels, the same for each component.

    Returns:
        `[B, 4 P, Ho, Wo]`, dense NHWC on the Triton backend, else contiguous; Ho = (H - 1) stride - 2 padding +
        dilation (kh - 1) + output_padding + 1.

    Raises:
        ValueError: shapes, types or options that do not fit.

    (RH-Emo's decoder, Guizzo et al. 2022.)
    """
    stride, padding, dilation = checks.window(stride, padding, dilation)
    output_padding = checks.pair("output_padding", output_padding, 0)
    checks.rank("x", x, ("B", "4 Q", "H", "W"))
    checks.rank("weight", weight, ("4", "Q", "P/groups", "kh", "kw"))
    groups = checks.groups(groups, weight.shape[1])
    checks.channels(x.shape[1], 4 * weight.shape[1], "4 * weight.shape[1]")
    checks.bias(bias, 4 * weight.shape[2] * groups)
    for extra, s, d in zip(output_padding, stride, dilation, strict=True):
        if extra >= max(s, d):
            raise ValueError(
                f"output_padding must be smaller than stride or dilation; got {output_padding} "
                f"with stride {stride} and dilation {dilation}"
            )
    kernel = weight.shape[3:]
    size = conv_reference.transposed_output_size(x.shape[2:], kernel, stride, padding, dilation, output_padding)
    checks.output_size(size, x)
    (rows, top), (columns, left) = (divmod(extra, s) for extra, s in zip(output_padding, stride, strict=True))
    if rows or columns:  # the adjoint of a convolution has no whole strides of output_padding: rows of zeros give them
        x, output_padding = torch.nn.functional.pad(x, (0, columns, 0, rows)), (top, left)
    x, weight, bias, backend, algorithm = _operands_of_layer("hamilton_conv_transpose2d", x, weight, bias, None)
    if backend == "reference":
        return conv_reference.hamilton_conv_transpose2d(
            x, weight, bias, stride, padding, output_padding, groups, dilation
        )
    window = (*stride, *padding, *dilation, groups)
    operator, x, tiles, tickets = _own(conv_op.hamilton_conv2d_dx, None, x, weight, bias, backend, algorithm, groups)
    computed_by = (runtime.operator_backend(backend), algorithm)
    return operator(x, weight, bias, tiles, tickets, None, size, window, 1.0, x.dtype, *computed_by)


def hamilton_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dropout: float = 0.0,
    flatten: bool = False,
    x_is_relu: bool = False,
    mask_gradient: bool = True,
    packed: PackedWeight | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Quaternion linear map, y = dropout(activation(weight (x) x + bias)), a Hamilton product from the left.

    Args:
        x: `[..., 4 K]`, features planar `[r | i | j | k]`.
        weight: `[4, N, K]`.
        bias: `[4 N]`.
        activation: None or "relu".
        dropout: probability of zeroing an element of y; the others are divided by 1 - dropout.
        flatten: read maps x `[B, 4 Q, H, W]`, Q H W = K, as `torch.flatten(x, 1)`, without a copy.
        x_is_relu, mask_gradient, packed: as in `hamilton_conv2d`; a dropout may follow the ReLU of x.
        dtype: type of y, by default that of x (or autocast's).

    Returns:
        `[..., 4 N]`.

    Raises:
        ValueError: shapes, types or options that do not fit.

    Notes:
        Casts under autocast as `torch.nn.functional.linear` does, except weight and bias on the Triton backend.
        Differentiable to any order; on the Triton backend only once behind a ReLU and with `x_is_relu`. There float32
        follows PyTorch's switch for matrix products (`torch.backends.cuda.matmul.allow_tf32`, off by default), and ReLU
        and dropout are part of the kernel, whose random numbers are its own, seeded by PyTorch's generator.

    (WASPAA 2023, section 2.1; Parcollet et al. 2019.)
    """
    checks.rank("weight", weight, ("4", "N", "K"))
    flatten = checks.flag("flatten", flatten)
    features = checks.features_of(x, flatten)
    leading = x.shape[:1] if flatten else x.shape[:-1]
    checks.channels(features, 4 * weight.shape[2], "4 * weight.shape[2]")
    checks.bias(bias, 4 * weight.shape[1])
    activation = checks.option("activation", activation, ACTIVATIONS)
    dropout = checks.number("dropout", dropout, "a probability, 0 to 1", 0, 1)
    x_is_relu, mask_gradient = checks.flag("x_is_relu", x_is_relu), checks.flag("mask_gradient", mask_gradient)
    checks.instance("packed", packed, PackedWeight, "a result of pack_weights")
    if dtype is not None:
        checks.floating("dtype", dtype)
    if flatten:  # on the Triton backend this is a convolution whose kernel is as large as the map
        weight = weight.unflatten(2, (-1, *x.shape[2:]))
    x, weight, bias, backend, algorithm = _operands_of_layer("hamilton_linear", x, weight, bias, packed)
    relu, dtype = activation == "relu", dtype or x.dtype
    if backend == "triton":
        if not flatten:  # a convolution of maps of one pixel
            x, weight = x.reshape(math.prod(leading), features, 1, 1), weight[..., None, None]
        arrays = _packed(packed, x, weight, algorithm)
        # A fused dropout and the ReLU have a common mask: both zero elements of y.
        fused = dropout if relu and dropout < 1 else 0.0
        seed = torch.randint(2**62, (1,), device=x.device) if fused else None
        layer = (UNIT, relu, fused, x_is_relu, mask_gradient or fused != dropout, dtype)
        computed_by = (runtime.operator_backend(backend), algorithm)
        y = conv_op.hamilton_conv2d(x, weight, bias, *arrays, seed, *layer, *computed_by)
        dropout = 0.0 if fused else dropout
    else:
        rows = x.reshape(math.prod(leading), features)
        weight = weight.flatten(2) if flatten else weight
        if backend == "reference":
            y = linear_reference.hamilton_linear(rows.relu() if x_is_relu else rows, weight, bias)
            y = y.relu() if relu else y
        else:
            own = (linear_op.hamilton_linear, packed, rows, weight, bias, backend, algorithm)
            operator, rows, tiles, _ = _own(*own, x_is_relu=x_is_relu)
            y = operator(rows, weight, bias, tiles, relu, x_is_relu, mask_gradient or dropout > 0, algorithm)
    y = torch.nn.functional.dropout(y, dropout) if dropout else y
    return torch.ops.aten._unsafe_view(y.to(dtype), (*leading, 4 * weight.shape[1]))  # no view, as of linear maps


class PackedWeight(NamedTuple):
    """A weight as the products of a layer read it, for maps of one type: a result of `pack_weights`.

    Attributes:
        tiles: on the Triton backend `[8 or 16, kh kw, P, Q]` in the order of memory, in the maps' type; in plain
            PyTorch the real weight of the form "dense", `[4 P, 4 Q, ...]`, or the weights of "q8", `[8, P, Q, ...]`.
        tickets: on the Triton backend counters of the layer's kernels, zero before and after each launch; else None.
        algorithm: form of the products that read the tiles, on the Triton backend with their precision.
    """

    tiles: Tensor
    tickets: Tensor | None
    algorithm: str

    @property
    def is_real(self) -> bool:
        """Whether the tiles are a real weight, with which the layer is PyTorch's own."""
        return self.algorithm == "dense"


def pack_weights(
    weights: Sequence[tuple[str, Tensor]], x: Tensor, sizes: Sequence[Pair] | None = None
) -> list[PackedWeight | None]:
    """Weights of several layers as their products read them, on the Triton backend packed in one launch.

    A layer that gets no packed weight packs its own. A packed weight is valid as long as the weight does not change;
    through one of the form "dense" the gradient flows to its weight.

    Args:
        weights: for each layer the name of the public function that computes it, and its weight, `[4, P, Q, kh, kw]` or
            `[4, N, K]`; for a linear map with `flatten`, `[4, N, Q, H, W]`.
        x: the first layer's input; the inputs of the others have the same type and device.
        sizes: height and width of each layer's input, by default those of x; plain PyTorch takes the form that is
            fastest for them, with a packed weight that of the weight.

    Returns:
        The packed weights; None where a layer packs its own: outside Triton and eager CPU code, and for the form "q8"
        there while its weight needs a gradient.

    Raises:
        ValueError: as for the layers.

    (The signed tiles of `ops/hamilton_conv/kernels.py`.)
    """
    checks.tensor("x", x)
    checks.floating("x", x.dtype)
    checks.layers(weights)
    for _, weight in weights:
        checks.floating("weight", weight.dtype)
    dtype = _cast_dtype(x)
    maps = [None] * len(weights) if sizes is None else checks.sizes(sizes, len(weights))
    plans = [runtime.plan_of(name, x, weight, dtype, size) for (name, weight), size in zip(weights, maps, strict=True)]
    packed = _plain_packed(weights, x, dtype, [algorithm for _, algorithm in plans])
    on_triton = [i for i, (backend, _) in enumerate(plans) if backend == "triton"]
    if on_triton:
        algorithms = [plans[i][1] for i in on_triton]
        detached = [weights[i][1].detach() for i in on_triton]
        operator_backend = runtime.operator_backend("triton")
        tiles, tickets = conv_op.hamilton_pack(detached, " ".join(algorithms), dtype, operator_backend)
        parts = tiles.split([packed_size(w.numel(), a) for w, a in zip(detached, algorithms, strict=True)])
        counters = tickets.split(MOST_TICKETS)
        for i, *parts_of_weight in zip(on_triton, parts, counters, algorithms, strict=True):
            packed[i] = PackedWeight(*parts_of_weight)
    return packed


def _plain_packed(
    weights: Sequence[tuple[str, Tensor]], x: Tensor, dtype: torch.dtype, algorithms: Sequence[str]
) -> list[PackedWeight | None]:
    """Weights packed for plain PyTorch, where that is worth it; of "dense" they can be differentiated."""
    packed: list[PackedWeight | None] = [None] * len(weights)
    if not eager(x, *(weight for _, weight in weights)):
        return packed
    cast = [(w.flatten(2) if name == "hamilton_linear" and w.dim() > 3 else w).to(dtype) for name, w in weights]
    dense = [i for i, algorithm in enumerate(algorithms) if algorithm == "dense"]
    tiles = dict(zip(dense, ExpandWeights.apply(1, *(cast[i] for i in dense)) if dense else (), strict=True))
    for i, algorithm in enumerate(algorithms):
        if algorithm == "q8" and not (torch.is_grad_enabled() and cast[i].requires_grad):
            tiles[i] = product_weight(cast[i], algorithm)
    for i, own in tiles.items():
        packed[i] = PackedWeight(own, None, algorithms[i])
    return packed


class GramTarget(NamedTuple):
    """Everything that the anti-transfer loss reads of the frozen features: a result of `gram_target`, reusable.

    Both tensors have one entry per sample along one axis, so that samples can be stored and selected by number.

    Attributes:
        values: the features `[B, C, *spatial]`; or, if these are smaller, the upper triangles of their Gram matrices,
            row by row, `[B, rows (rows + 1) / 2]`, each multiplied by the square of its scale.
        stats: `[2, B]`, the squared norm of the scaled Gram matrix, and the scale, a power of two.
        triangles: whether `values` are the upper triangles of Gram matrices.
        loss: the loss that the target is for.
    """

    values: Tensor
    stats: Tensor
    triangles: bool
    loss: Loss

    def of(self, index: Tensor) -> GramTarget:
        """The targets of the samples with these numbers, `[b]`."""
        checks.parts("", self)
        checks.numbers(index, self.values)
        return self._replace(values=self.values.index_select(0, index), stats=self.stats.index_select(1, index))


def gram_target(frozen: Tensor, *, loss: Loss | str = "gram-channel") -> GramTarget:
    """A target that `anti_transfer_loss` and `anti_transfer_tap` take in place of features that never change.

    Args:
        frozen: `[B, C, *spatial]`, features of the frozen network.
        loss: "gram-channel" or "gram-position", or a value of these; the others mix the samples of a batch.

    Returns:
        The detached features, or the upper triangles of their Gram matrices (float32, summed in float64) if these are
        smaller; with their statistics. The loss equals that of the features: bit for bit, or with triangles within
        1e-6.

    Raises:
        ValueError: features or a loss that do not fit.

    >>> target = gram_target(torch.rand(5, 4, 8, 8))
    >>> target.values.shape, target.of(torch.tensor([3, 1])).values.shape
    (torch.Size([5, 10]), torch.Size([2, 10]))
    """
    loss = loss_of(loss)
    checks.features(frozen, frozen, "frozen", "frozen")
    if loss.gram is None or not loss.per_sample:
        raise ValueError(f"loss must be 'gram-channel' or 'gram-position' for a target; got {loss.name!r}")
    gram, centred = loss.gram
    triangles = _triangles_are_smaller(frozen, gram)
    with torch.no_grad():
        values, stats = gram_op.target(frozen.detach(), gram, centred, triangles, _fast_backend(frozen, frozen))
    return GramTarget(values, stats, triangles, loss)


def gram_cosine(a: Tensor, b: Tensor, *, gram: str = "channel", centred: bool = False) -> Tensor:
    """Cosine of the Gram matrices G = F F^T of two feature maps: <G_a, G_b> / (|G_a| |G_b|).

    Args:
        a: `[B, C, *spatial]`, any strides.
        b: `[B, C, *spatial]`.
        gram: "channel" (the paper's): F `[C, N]` of each sample. "position": F `[N, C]` of each sample, whose Gram
            matrix no rotation of the channels changes. "batch": F `[B, C N]`, one for all samples.
        centred: subtract from each column of F its mean over the rows; the cosine of "batch" is then linear CKA.

    Returns:
        `[B]`, for "batch" a scalar, in [0, 1]; float32 (float64 for float64 features), under autocast too. If a matrix
        is all zero, cosine and gradient are 0; NaN gives NaN.

    Raises:
        ValueError: shapes, types or options that do not fit.

    Notes:
        The three scalars of the cosine follow from the products of the rows of F and from those of its columns; the
        fewer ones are computed. A power of two scales the features first, so that they may have any size. Saves for the
        backward a, b, and five scalars per cosine. A second derivative needs the backend "reference".

    >>> a = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # G = I
    >>> gram_cosine(a, torch.tensor([[[5.0, 0.0], [0.0, 0.0]]]))  # 1 / sqrt(2)
    tensor([0.7071])

    (WASPAA 2023, equation 1; Guizzo et al. 2021. Linear CKA: Kornblith et al. 2019.)
    """
    checks.features(a, b, "a", "b")
    gram, centred = checks.option("gram", gram, GRAMS), checks.flag("centred", centred)
    if gram == "batch" and a.shape[0] == 0:
        return _of_no_samples(a, b)
    if _is_reference(a, b):
        cosine = _in_float32(gram_reference.gram_cosine, a, b, gram, centred)
    else:
        cosine = gram_op.gram_cosine(*_operands(a, b, gram, centred))[0]
    return cosine[0] if gram == "batch" else cosine


def linear_cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment of two representations of the same samples.

    The cosine of the centred Gram matrices over the samples: |A^T B|^2 / (|A^T A| |B^T B|) with centred columns.

    Args:
        a: `[B, ...]`, one row of features per sample.
        b: `[B, ...]`, of any number of features.

    Returns:
        A scalar in [0, 1], differentiable by both.

    Raises:
        ValueError: different numbers of samples, or types that do not fit.

    >>> a = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    >>> rotated = a @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    >>> linear_cka(a, rotated)
    tensor(1.)

    (Kornblith et al. 2019, section 3.)
    """
    for name, value in (("a", a), ("b", b)):
        checks.tensor(name, value)
        if value.dim() < 2:
            raise ValueError(f"{name} must have dimensions [B, ...]; got shape {tuple(value.shape)}")
        if value.shape[1:].numel() == 0:
            raise ValueError(f"{name} must have at least one channel and one position; got shape {tuple(value.shape)}")
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"b must have as many samples as a; got {b.shape[0]} and {a.shape[0]}")
    if a.shape != b.shape:
        # Additional features that are zero change no Gram matrix over the samples.
        a, b = a.flatten(1), b.flatten(1)
        size = max(a.shape[1], b.shape[1])
        a, b = (torch.nn.functional.pad(x, (0, size - x.shape[1])) for x in (a, b))
    return gram_cosine(a, b, gram="batch", centred=True)


def anti_transfer_loss(
    trained: Tensor,
    frozen: Tensor | GramTarget,
    *,
    loss: Loss | str = "gram-channel",
    beta: float = 1.0,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Anti-transfer loss: the similarity to the frozen network's features, by default beta cos^2 of Gram matrices.

    Args:
        trained: `[B, C, *spatial]`, features of the network in training.
        frozen: `[B, C, *spatial]`, features of the frozen network of the orthogonal task; or their `gram_target`.
        loss: a loss of `qkernels.losses`, or its name.
        beta: weight of the loss; "folded-rowwise" applies it twice, as the released research code does.
        reduction: "mean", "none" or "sum" over the batch; a loss with one value per batch has that value for "mean" and
            "sum".
        generator: source of randomness of aggregation "stochastic_pairwise"; by default PyTorch's for the features'
            device, the only one that `torch.compile(fullgraph=True)` takes.

    Returns:
        A scalar, or `[B]` for reduction "none"; float32 (float64 for float64 features), under autocast too. Of an empty
        batch NaN, as PyTorch's means are, and 0 for "sum" of a loss that has a value per sample.

    Raises:
        ValueError: shapes, types or options that do not fit; reduction "none" for a loss with one value per batch; a
            target of another loss; a generator for a loss that draws nothing.

    Notes:
        The cosine with a vector of zeros is 0; only "folded-rowwise" clamps norms, at 1e-8. "pairwise" is computed from
        sums over the channels and takes no more memory than the features.

    >>> f = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> anti_transfer_loss(f, f, beta=0.5)
    tensor(0.5000)
    >>> anti_transfer_loss(torch.rand(3, 2, 4), torch.rand(3, 2, 4), loss="cka").shape
    torch.Size([])

    (WASPAA 2023, equation 1; Guizzo et al. 2021.)
    """
    loss = loss_of(loss)
    checks.loss_options(loss, reduction, generator)
    _check_frozen(trained, frozen, "trained", loss)
    weight = loss.weight(checks.number("beta", beta, "a finite number"))
    if trained.shape[0] == 0 and isinstance(frozen, Tensor) and not loss.per_sample:
        return weight * _of_no_samples(trained, frozen)
    if loss.gram is not None and not _is_reference(trained, frozen):
        cosine, value, *_ = gram_op.gram_cosine(*_operands(trained, frozen, *loss.gram, weight, reduction == "mean"))
        return weight * cosine.square() if reduction == "none" else value
    assert isinstance(frozen, Tensor)
    if loss.gram is not None:
        cosine = _in_float32(gram_reference.gram_cosine, trained, frozen, *loss.gram)
        squares = weight * cosine.square()
        return squares if reduction == "none" else squares.mean() if reduction == "mean" else squares.sum()
    if isinstance(loss, FoldedRowwise):
        return _folded_rowwise(trained, frozen, weight, loss.clamp)
    assert isinstance(loss, CosSquared | MseSigmoid)
    return weight * _in_float32(similarity, trained, frozen, loss.aggregation, loss.name, generator)


def anti_transfer_tap(
    features: Tensor,
    frozen: Tensor | GramTarget,
    *,
    loss: Loss | str = "gram-channel",
    beta: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The unchanged features and their anti-transfer loss, with one pass for the sum of both gradients.

    Feed the returned features to the next layer. If the loss is the cosine of Gram matrices, its backward adds the
    incoming gradient as it writes its own, which saves a pass over the features.

    Args:
        features: `[B, C, *spatial]`, features of the network in training.
        frozen: `[B, C, *spatial]`, features of the frozen network; or their `gram_target`.
        loss: as in `anti_transfer_loss`.
        beta: weight of the loss.
        reduction: "mean" or "sum" over the batch.

    Returns:
        (features, loss): a view of the features, and a scalar, which need not take part in the backward.

    Raises:
        ValueError: as for `anti_transfer_loss`.

    >>> features = torch.rand(2, 4, 3, 3, requires_grad=True)
    >>> same, loss = anti_transfer_tap(features, torch.rand(2, 4, 3, 3), beta=0.5)
    >>> (same.sum() + loss).backward()

    (WASPAA 2023, equation 2.)
    """
    loss = loss_of(loss)
    checks.option("reduction", reduction, ("mean", "sum"))
    _check_frozen(features, frozen, "features", loss)
    beta = checks.number("beta", beta, "a finite number")
    empty = features.shape[0] == 0 and not loss.per_sample
    if loss.gram is None or _is_reference(features, frozen) or empty:
        return features, anti_transfer_loss(features, frozen, loss=loss, beta=beta, reduction=reduction)
    return _Tap.apply(*_operands(features, frozen, *loss.gram, loss.weight(beta), reduction == "mean"))


class _Tap(torch.autograd.Function):
    """The first operand unchanged, and the loss: an operator of `torch.library` cannot return its input."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        output = gram_op.gram_cosine(features, *rest)
        gram_op.remember(ctx, (features, *rest), output)
        return features.view_as(features), output[1]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
        by_operand = gram_op.gradients(ctx, None, dloss, incoming)
        return *by_operand, *[None] * (len(ctx.needs_input_grad) - len(by_operand))


def _check_frozen(trained: Tensor, frozen: Tensor | GramTarget, name: str, loss: Loss) -> None:
    if isinstance(frozen, GramTarget):
        checks.target(trained, frozen, name, loss)
    else:
        checks.features(trained, frozen, name, "frozen")


def _folded_rowwise(trained: Tensor, frozen: Tensor, weight: float, clamp: str) -> Tensor:
    rows, positions = trained.shape[0] * trained.shape[1], trained.shape[2:].numel()
    obstacle = kernel_obstacle(rows, positions, trained.dtype, frozen.dtype)
    backend = runtime.backend_of("anti_transfer_loss", trained, frozen, obstacle=obstacle)
    if backend == "reference" or runtime.needs_own_operators():
        return weight * _in_float32(folded_reference.folded_rowwise, trained, frozen, clamp)
    return folded_op.folded_rowwise(trained, frozen, clamp, weight, runtime.operator_backend(backend))[0]


def _of_no_samples(a: Tensor, b: Tensor) -> Tensor:
    """The value of an empty batch, NaN as any mean over nothing, with gradients of the features' shape."""
    return (a.sum() + b.sum()).to(compute_dtype(a, b)) * math.nan


def _operands(
    a: Tensor, b: Tensor | GramTarget, gram: str, centred: bool, beta: float = 1.0, mean: bool = True
) -> tuple[Any, ...]:
    """Arguments of the operator `gram_cosine`."""
    options, backend = (gram, centred, beta, mean), _fast_backend(a, b)
    if isinstance(b, GramTarget):
        return a, b.values, b.stats, b.triangles, *options, False, backend
    return a, b, None, False, *options, torch.is_grad_enabled() and b.requires_grad, backend


def _is_reference(a: Tensor, b: Tensor | GramTarget) -> bool:
    """Whether the einsum definition computes the cosine: of features, as it takes no targets."""
    if not isinstance(b, Tensor):
        return False
    return runtime.needs_own_operators() or runtime.backend_of("gram_cosine", a, b) == "reference"


def _fast_backend(a: Tensor, b: Tensor | GramTarget) -> str:
    backend = runtime.backend_of("gram_cosine", a, b.values if isinstance(b, GramTarget) else b)
    return "torch" if backend == "reference" else runtime.operator_backend(backend)


def _triangles_are_smaller(features: Tensor, gram: str) -> bool:
    """Whether triangles of Gram matrices in float32 take less memory than the features."""
    channels, positions = features.shape[1], features.shape[2:].numel()
    rows = channels if gram == "channel" else positions
    size = 8 if features.dtype == torch.float64 else 4
    return rows * (rows + 1) // 2 * size < channels * positions * features.element_size()


def _in_float32(function: Any, a: Tensor, b: Tensor, *args: Any) -> Tensor:
    dtype, device = compute_dtype(a, b), a.device.type
    off = torch.autocast(device, enabled=False) if autocast_dtype(device) else contextlib.nullcontext()
    with off:
        return function(a.to(dtype), b.to(dtype), *args)


def _own(
    operator: Any,
    packed: PackedWeight | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    backend: str,
    algorithm: str,
    groups: int = 1,
    x_is_relu: bool = False,
) -> tuple[Any, Tensor, Tensor | None, Tensor | None]:
    """A layer's operator as its operands need it, and x, tiles and tickets for it.

    Eager plain PyTorch has no dispatcher, which takes as long as a small layer. The algorithms "real" and "dense" are
    made of PyTorch's own layers there, and differentiated by PyTorch.
    """
    if backend == "triton":
        return operator, x, *_packed(packed, x, weight, algorithm)
    if algorithm == "real":
        return plain(operator), x, None, None
    if not eager(x, weight, bias):
        return operator, x, None, None
    tiles = None if packed is None else _packed(packed, x, weight, algorithm)[0]
    if algorithm == "dense" and operator is not conv_op.hamilton_conv2d_dx:
        wanted = torch.is_grad_enabled() and weight.requires_grad
        if tiles is None or groups > 1 or (wanted and not tiles.requires_grad):
            (tiles,) = ExpandWeights.apply(groups, weight)
        if x_is_relu and x.requires_grad and torch.is_grad_enabled():
            x = x.relu()  # changes no value, and masks the gradient
        return plain(operator), x, tiles, None
    return direct(operator), x, tiles, None


def _operands_of_layer(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedWeight | None
) -> tuple[Tensor, Tensor, Tensor | None, str, str]:
    """The operands as a layer reads them, its backend, and the algorithm of its products.

    Casts as autocast does for PyTorch's own convolutions; then all operands must have one type and device. The Triton
    kernels read parameters in their own type: for them only x is cast, to channels-last in the same pass.
    """
    autocast = autocast_dtype(x.device.type)
    dtype = _cast_dtype(x) if autocast else x.dtype
    backend, algorithm = runtime.plan_of(name, x, weight, dtype)
    if backend == "torch" and packed is not None and packed.algorithm in PLAIN_FORMS and algorithm in PLAIN_FORMS:
        algorithm = packed.algorithm
    layout = torch.preserve_format
    if weight.dim() == 5 and backend == "triton":  # rows of features may have any number of dimensions
        layout = torch.channels_last
    elif weight.dim() == 5 and algorithm == "q8":  # once for both directions
        layout = torch.contiguous_format
    if layout is not torch.preserve_format or dtype is not x.dtype:
        x = x.to(dtype, memory_format=layout)
    if autocast and backend != "triton":
        weight, bias = weight.to(_cast_dtype(weight)), None if bias is None else bias.to(_cast_dtype(bias))
    checks.floating("x", x.dtype)
    for label, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != x.dtype and not (autocast and backend == "triton"):
            raise ValueError(f"{label} must have the type of x; got {other.dtype} and {x.dtype}")
        if other is not None and other.device != x.device:
            raise ValueError(f"{label} must be on the device of x; got {other.device} and {x.device}")
    return x, weight, bias, backend, algorithm


def _packed(packed: PackedWeight | None, x: Tensor, weight: Tensor, algorithm: str) -> tuple[Tensor, Tensor | None]:
    """Tiles and tickets for a layer."""
    if packed is None:
        backend = runtime.operator_backend("triton")
        tiles, tickets = conv_op.hamilton_pack([weight.detach()], algorithm, x.dtype, backend)
        return tiles, tickets
    dtype = compute_dtype(x) if algorithm == "q8" else x.dtype
    if (packed.algorithm, packed.tiles.dtype) != (algorithm, dtype) or packed.tiles.numel() != packed_size(
        weight.numel(), algorithm
    ):
        raise ValueError(
            f"packed must be of this weight, for {x.dtype} and {algorithm!r}; got {packed.tiles.numel()} elements for "
            f"{packed.tiles.dtype} and {packed.algorithm!r}"
        )
    return packed.tiles, packed.tickets


def _cast_dtype(x: Tensor) -> torch.dtype:
    """The type of x behind autocast, which leaves float64 and integers."""
    casts = x.is_floating_point() and x.dtype != torch.float64
    return (autocast_dtype(x.device.type) if casts else None) or x.dtype
