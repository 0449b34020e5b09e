"""Registers an operator with PyTorch: implementation, shapes, derivative."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qkernels.ops._launch import KernelUnavailable


def define(
    name: str,
    *,
    fake: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    differentiable: tuple[str, ...] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that turns a plain tensor function into the operator ``qkernels::name``.

    Args:
        name: the operator's name.
        fake: the function's result as empty tensors.
        save: stores in `ctx` what `backward` needs; called as `save(ctx, inputs, output)`.
        backward: gradients of the differentiable arguments; made of operators, so that it can be differentiated again.
        differentiable: names of the arguments that `backward` gives gradients of, in its order; None for all.

    Returns:
        The decorator.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def forward(*args: Any) -> Any:
            # The dispatcher leaves autocast on inside an operator: aten calls made here would be cast again.
            first = args[0] if isinstance(args[0], (list, tuple)) else args
            device = next(arg.device.type for arg in first if isinstance(arg, Tensor))
            if autocast_dtype(device):
                with torch.autocast(device, enabled=False):
                    return function(*args)
            return function(*args)

        operator = torch.library.custom_op(f"qkernels::{name}", forward, mutates_args=())
        operator.register_fake(fake)
        derivative = backward if differentiable is None else _padded(backward, differentiable, function)
        operator.register_autograd(derivative, setup_context=save)
        return operator

    return decorate


def _padded(
    backward: Callable[..., Any], differentiable: tuple[str, ...], function: Callable[..., Any]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """`backward` as PyTorch wants it: a gradient for each argument of `function`, None for those without."""
    places = {name: place for place, name in enumerate(inspect.signature(function).parameters)}
    chosen = [places[name] for name in differentiable]

    def padded(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None] * len(places)
        for place, gradient in zip(chosen, backward(ctx, *gradients), strict=True):
            out[place] = gradient
        return tuple(out)

    return padded


@contextlib.contextmanager
def or_plain(backend: str) -> Iterator[None]:
    """Around `return` of what kernels compute: where one cannot be built, goes on behind the block, with one warning.

    Args:
        backend: the operator's: "auto", or "triton" for nothing else.

    Raises:
        ValueError: a kernel cannot be built, and the backend is "triton".
    """
    try:
        yield
    except KernelUnavailable as error:
        if backend != "auto":
            raise ValueError(f"backend 'triton' was asked for, but {error}: use 'auto' or 'reference'") from error
        if str(error) not in _warned:
            _warned.add(str(error))
            warnings.warn(f"{error}; plain PyTorch computes in its place, more slowly", RuntimeWarning, stacklevel=3)


_warned: set[str] = set()


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to on this type of device; None where it is off or unknown."""
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# Dynamo cannot trace the question before torch 2.12; the answer is the same for ever. As in _launch.py.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def relu_mask(dy: Tensor, y: Tensor | None) -> Tensor:
    """The gradient behind a ReLU whose output was `y`; `dy` itself where there was none."""
    return dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)


def first_order_only(name: str) -> dict[str, Any]:
    """`save` and `backward` of an operator that is the gradient of `name`, and has none itself."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            f"{name} has no second derivative; compute it under qkernels.set_backend('reference')"
        )

    return {"save": save, "backward": backward}


def refuse_second_derivative(fused: bool) -> None:
    """Raises where a product of the Triton kernels took a fused ReLU or pool along.

    Raises:
        NotImplementedError: there was one.
    """
    if fused:
        raise NotImplementedError(
            "the Triton kernels have no second derivative behind a fused ReLU or pool; compute it under "
            "qkernels.set_backend('reference')"
        )
