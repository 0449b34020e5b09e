"""Registers an operator with PyTorch: implementation, shapes, derivative."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qkernels.ops._launch import KernelUnavailable


def define(
    name: str, *, fake: Callable[..., Any], save: Callable[..., None], backward: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that turns a plain tensor function into the operator ``qkernels::name``.

    Args:
        name: the operator's name.
        fake: the function's result as empty tensors.
        save: stores in `ctx` what `backward` needs; called as `save(ctx, inputs, output)`.
        backward: gradients of all arguments; made of operators, so that it can be differentiated again.

    Returns:
        The decorator.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def forward(*args: Any) -> Any:
            # The dispatcher leaves autocast on inside an operator: aten calls made here would be cast again.
            device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
            if autocast_dtype(device):
                with torch.autocast(device, enabled=False):
                    return function(*args)
            return function(*args)

        operator = torch.library.custom_op(f"qkernels::{name}", forward, mutates_args=())
        operator.register_fake(fake)
        operator.register_autograd(backward, setup_context=save)
        return operator

    return decorate


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


def first_order_only(name: str) -> dict[str, Callable[..., Any]]:
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
