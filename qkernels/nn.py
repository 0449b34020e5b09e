"""Quaternion layers and the anti-transfer loss as modules, which hold parameters and call `functional`."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from qkernels import checks
from qkernels import functional as F
from qkernels.init import quaternion_glorot_, quaternion_he_
from qkernels.losses import Loss, loss_of

INITS = {"glorot": quaternion_glorot_, "he": quaternion_he_}


class _QuaternionLayer(nn.Module):
    """A layer's `weight` and `bias`, and their initialisation."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, ...],
        out_features: int,
        bias: bool,
        init: str,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        checks.factory(shape, device, dtype)
        self.init = checks.option("init", init, tuple(INITS))
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if checks.flag("bias", bias) else None,
        )
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the weight anew and zeroes the bias."""
        INITS[self.init](self.weight, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `Module.to` calls: of `memory_format=torch.channels_last` PyTorch assumes that weights have 4 axes."""

        def apply(x: Tensor) -> Tensor:
            try:
                return fn(x)
            except RuntimeError:
                if x.dim() != 5:
                    raise
                return fn(x.flatten(0, 1)).contiguous().view(x.shape)

        return super()._apply(apply, recurse)


class QuaternionConv2d(_QuaternionLayer):
    """Quaternion convolution, y = pool(activation(weight (x) x + bias)).

    Args:
        in_channels: real channels of the input, 4 per quaternion.
        out_channels: real channels of the output, 4 per quaternion.
        kernel_size, stride, padding, dilation: pixels, one number or (vertical, horizontal).
        groups: number of groups of the quaternion channels.
        bias: whether there is a real bias per output channel.
        activation: None or "relu".
        pool: None, or 2 for the maxima of 2x2 windows.
        init: "glorot" or "he" (`qkernels.init`).
        generator: source of randomness of the initialisation.
        device, dtype: device and type of the parameters.

    Shapes:
        x `[B, in_channels, H, W]`; weight `[4, out_channels/4, in_channels/4/groups, kh, kw]`; bias
        `[out_channels]`; y `[B, out_channels, Ho, Wo]`, or half as high and wide behind a pool.

    Raises:
        ValueError: channels not divisible by 4, or by 4 * groups; unknown options.

    >>> QuaternionConv2d(4, 64, 3, padding=1, activation="relu")(torch.zeros(2, 4, 8, 8)).shape
    torch.Size([2, 64, 8, 8])

    (WASPAA 2023, section 2.1; see `functional.hamilton_conv2d`.)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        activation: str | None = None,
        pool: int | None = None,
        init: str = "glorot",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        groups = checks.count("groups", groups)
        p = checks.quaternions("out_channels", out_channels, groups)
        q = checks.quaternions("in_channels", in_channels, groups)
        kernel = checks.pair("kernel_size", kernel_size, 1)
        super().__init__((4, p, q // groups, *kernel), 4 * p, bias, init, generator, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size, self.groups = 4 * q, 4 * p, kernel, groups
        self.stride, self.padding, self.dilation = checks.window(stride, padding, dilation)
        self.activation = checks.option("activation", activation, F.ACTIVATIONS)
        self.pool = checks.option("pool", pool, F.POOLS)

    def forward(self, x: Tensor) -> Tensor:
        return F.hamilton_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            pool=self.pool,
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, " + _changed(
            self, kernel_size=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, activation=None, pool=None
        )


class QuaternionConvTranspose2d(_QuaternionLayer):
    """Transposed quaternion convolution: the adjoint of the convolution with the same weight, plus bias.

    Args:
        in_channels: real channels of the input, 4 per quaternion.
        out_channels: real channels of the output, 4 per quaternion.
        kernel_size, stride, padding, output_padding, dilation: pixels, one number or (vertical, horizontal).
        groups: number of groups of the quaternion channels.
        bias: whether there is a real bias per output channel.
        init: "glorot" or "he" (`qkernels.init`), whose fans are swapped here by the weight's shape.
        generator: source of randomness of the initialisation.
        device, dtype: device and type of the parameters.

    Shapes:
        x `[B, in_channels, H, W]`; weight `[4, in_channels/4, out_channels/4/groups, kh, kw]`; bias
        `[out_channels]`; y `[B, out_channels, Ho, Wo]`.

    Raises:
        ValueError: channels not divisible by 4, or by 4 * groups; unknown options.

    (RH-Emo's decoder, Guizzo et al. 2022; see `functional.hamilton_conv_transpose2d`.)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        *,
        init: str = "he",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        groups = checks.count("groups", groups)
        p = checks.quaternions("out_channels", out_channels, groups)
        q = checks.quaternions("in_channels", in_channels, groups)
        kernel = checks.pair("kernel_size", kernel_size, 1)
        super().__init__((4, q, p // groups, *kernel), 4 * p, bias, init, generator, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size, self.groups = 4 * q, 4 * p, kernel, groups
        self.stride, self.padding, self.dilation = checks.window(stride, padding, dilation)
        self.output_padding = checks.pair("output_padding", output_padding, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.hamilton_conv_transpose2d(
            x, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, " + _changed(
            self, kernel_size=None, stride=(1, 1), padding=(0, 0), output_padding=(0, 0), groups=1, dilation=(1, 1)
        )


class QuaternionLinear(_QuaternionLayer):
    """Quaternion linear map, y = dropout(activation(weight (x) x + bias)).

    Args:
        in_features: real features of the input, 4 per quaternion.
        out_features: real features of the output, 4 per quaternion.
        bias: whether there is a real bias per output feature.
        activation: None or "relu".
        dropout: probability of zeroing an element of y in training.
        init: "he" or "glorot" (`qkernels.init`).
        generator: source of randomness of the initialisation.
        device, dtype: device and type of the parameters.

    Shapes:
        x `[..., in_features]`; weight `[4, out_features/4, in_features/4]`; bias `[out_features]`;
        y `[..., out_features]`.

    Raises:
        ValueError: features not divisible by 4; unknown options.

    (WASPAA 2023, section 2.1; see `functional.hamilton_linear`.)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        dropout: float = 0.0,
        init: str = "he",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        n, k = checks.quaternions("out_features", out_features), checks.quaternions("in_features", in_features)
        super().__init__((4, n, k), 4 * n, bias, init, generator, device, dtype)
        self.in_features, self.out_features = 4 * k, 4 * n
        self.activation = checks.option("activation", activation, F.ACTIVATIONS)
        # None instead of 0.0, which torch.compile would treat as a number that may change.
        self.dropout = checks.number("dropout", dropout, "a probability, 0 to 1", 0, 1) or None

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training and self.dropout else 0.0
        return F.hamilton_linear(x, self.weight, self.bias, activation=self.activation, dropout=dropout)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}" + _changed(self, ", ", activation=None, dropout=None)


class QuaternionBatchNorm2d(nn.modules.batchnorm._BatchNorm):
    """Quaternion batch norm: four means, one variance.

    y = weight (x - mean) / sqrt(var + eps) + bias, where mean `[4]` is one number per component, over batch,
    quaternion channels and space, and var is the mean over the same elements of |x - mean|^2, summed over
    components (biased). In eval mode the running values take their place, with gradient. An empty batch changes none.

    Args:
        num_features: real channels C, 4 per quaternion.
        eps: added to the variance.
        momentum: share of a batch in the running values; None weights all batches equally.
        device, dtype: device and type of the parameters.

    Shapes:
        x `[B, C, H, W]`; weight `[C/4]`, shared by the components, 1 at first; bias `[C]`, 0 at first;
        buffers running_mean `[4]`, running_var `[1]`, num_batches_tracked `[]`.

    Raises:
        ValueError: channels not divisible by 4; maps or options that do not fit.

    (RH-Emo's decoder, Guizzo et al. 2022; Gaudet & Maida 2018.)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        quaternions = checks.quaternions("num_features", num_features)
        checks.factory((num_features,), device, dtype)
        eps = checks.number("eps", eps, "a finite number >= 0", 0)
        if momentum is not None:
            momentum = checks.number("momentum", momentum, "None or a number from 0 to 1", 0, 1)
        super().__init__(4 * quaternions, eps, momentum, affine=False, device=device, dtype=dtype)
        self.affine = True
        self.weight = nn.Parameter(torch.ones(quaternions, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(4 * quaternions, device=device, dtype=dtype))
        self.running_mean = torch.zeros(4, device=device, dtype=dtype)
        self.running_var = torch.ones(1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        checks.tensor("x", x)
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"x must have shape [B, {self.num_features}, H, W]; got {tuple(x.shape)}")
        checks.floating("x", x.dtype)
        if x.device != self.weight.device:
            raise ValueError(f"weight must be on the device of x; got {self.weight.device} and {x.device}")
        running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        assert running_mean is not None
        assert running_var is not None
        assert batches is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (4, -1))
        if self.training and wide.numel():
            mean = wide.mean((0, 2, 3, 4))
            centred = wide - mean.view(4, 1, 1, 1)
            var = centred.square().sum(1).mean().view(1)
            with torch.no_grad():
                batches.add_(1)
                share = self.momentum if self.momentum is not None else batches.to(running_mean.dtype).reciprocal()
                running_mean.lerp_(mean.to(running_mean.dtype), share)
                running_var.lerp_(var.to(running_var.dtype), share)
        else:
            centred, var = wide - running_mean.view(4, 1, 1, 1), running_var
        y = centred * (self.weight.view(-1, 1, 1) * (var + self.eps).rsqrt().view(1, 1, 1))
        return (y.flatten(1, 2) + self.bias.view(-1, 1, 1)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class AntiTransferLoss(nn.Module):
    """`functional.anti_transfer_loss` with fixed options.

    Args:
        loss: a loss of `qkernels.losses`, or its name.
        beta: weight of the loss.
        reduction: "mean", "none" or "sum" over the batch.
        generator: source of randomness of aggregation "stochastic_pairwise".

    Shapes:
        trained, frozen `[B, C, *spatial]` (or a `GramTarget` of the same loss for `frozen`); loss scalar, or `[B]` for
        reduction "none"; float32 (float64 for float64 features), under autocast too.

    Raises:
        ValueError: unknown loss; reduction "none" for a loss with one value per batch; features that do not fit.

    >>> from qkernels.losses import CosSquared
    >>> loss = AntiTransferLoss(CosSquared("mean"), beta=0.5)
    >>> loss(torch.ones(2, 4, 3, 3), torch.ones(2, 4, 3, 3))
    tensor(0.5000)

    (WASPAA 2023, equation 1; Guizzo et al. 2021.)
    """

    def __init__(
        self,
        loss: Loss | str = "gram-channel",
        *,
        beta: float = 1.0,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.beta = loss_of(loss), checks.number("beta", beta, "a finite number")
        checks.loss_options(self.loss, reduction, generator)
        self.reduction, self.generator = reduction, generator

    def forward(self, trained: Tensor, frozen: Tensor | F.GramTarget) -> Tensor:
        return F.anti_transfer_loss(
            trained, frozen, loss=self.loss, beta=self.beta, reduction=self.reduction, generator=self.generator
        )

    def extra_repr(self) -> str:
        return f"{self.loss!r}, beta={self.beta}, reduction={self.reduction!r}"


def _changed(module: nn.Module, prefix: str = "", **defaults: Any) -> str:
    """The attributes that are not default, for `extra_repr`."""
    changed = [
        f"{key}={getattr(module, key)!r}" for key, default in defaults.items() if getattr(module, key) != default
    ]
    if getattr(module, "bias", None) is None:
        changed.append("bias=False")
    return prefix + ", ".join(changed) if changed else ""
