"""Registers an operator with PyTorch: implementation, shapes, derivative."""

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import infer_schema, register_autograd, register_fake

from qkernels.ops._launch import KernelUnavailable
from qkernels.runtime.precision import autocast_dtype

_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")


def define(
    name: str,
    fake: Callable[[Any], Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    differentiable: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that turns a plain tensor function into the operator ``qkernels::name``.

    Args:
        name: name of the operator.
        fake: `fake(inputs)` returns empty tensors like the results; `inputs` has the arguments as attributes.
        save: `save(ctx, inputs, output)` stores in `ctx` the tensors that `backward` needs; `ctx.inputs` already holds
            the arguments that are no tensors, as attributes.
        backward: gradients of the differentiable arguments, computed by operators, so that they are differentiable too.
        differentiable: names of the arguments that `backward` returns gradients of, in its order.

    Returns:
        The decorator.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        parameters = inspect.signature(function).parameters
        names = [*parameters]
        constants = [name for name, parameter in parameters.items() if "Tensor" not in str(parameter.annotation)]
        operands = [names.index(name) for name in differentiable]

        @functools.wraps(function)
        def forward(*args: Any) -> Any:
            # The dispatcher leaves autocast on inside an operator: aten calls made here would be cast again.
            first = args[0] if isinstance(args[0], (list, tuple)) else args
            device = next(arg.device.type for arg in first if isinstance(arg, Tensor))
            with _without_autocast(device):
                results = function(*args)
            return _owned(results) if isinstance(results, Tensor) else tuple(map(_owned, results))

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            by_name = dict(zip(names, inputs, strict=True))
            ctx.inputs = SimpleNamespace(**{name: by_name[name] for name in constants})
            save(ctx, SimpleNamespace(**by_name), output)

        def gradients(ctx: Any, *incoming: Any) -> tuple[Tensor | None, ...]:
            results: list[Tensor | None] = [None] * len(names)
            for place, gradient in zip(operands, backward(ctx, *incoming), strict=True):
                results[place] = gradient
            return tuple(results)

        class Direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                results = forward(*args)
                setup_context(ctx, args, results)
                return results

            @staticmethod
            def backward(ctx: Any, *incoming: Any) -> Any:
                with _without_autocast("cpu"):
                    return gradients(ctx, *incoming)

        def direct(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(args[n] is not None and args[n].requires_grad for n in operands):
                return Direct.apply(*args)  # type: ignore[no-untyped-call]
            return forward(*args)

        # Not by `torch.library.custom_op`, whose first call imports torch._dynamo (160 MB, a second), and each call of
        # which compares all results with all arguments for memory in common.
        _LIBRARY.define(name + infer_schema(function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
        operator = getattr(torch.ops.qkernels, name).default
        register_fake(
            operator, lambda *args: fake(SimpleNamespace(**dict(zip(names, args, strict=True)))), lib=_LIBRARY
        )
        register_autograd(operator, gradients, setup_context=setup_context, lib=_LIBRARY)
        _functions[operator] = _Functions(function, forward, direct)
        return operator

    return decorate


class _Functions(NamedTuple):
    """What computes an operator: its body, what the dispatcher calls below autograd, and both without dispatcher."""

    body: Callable[..., Any]
    implementation: Callable[..., Any]
    direct: Callable[..., Any]


_functions: dict[Any, _Functions] = {}


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if autocast_dtype(device) else _NOTHING


_NOTHING = contextlib.nullcontext()


def implementation(operator: Any) -> Callable[..., Any]:
    """What the dispatcher calls for an operator, below autograd."""
    return _functions[operator].implementation


def direct(operator: Any) -> Callable[..., Any]:
    """An operator without PyTorch's dispatcher, which takes as long as a small layer: for tensors that are `eager`."""
    return _functions[operator].direct


def eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd needs to see an operator of these: they are on the CPU, and nobody traces them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    return all(x is None or (type(x) in _PLAIN and x.is_cpu) for x in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


def plain(operator: Any) -> Callable[..., Any]:
    """The body of an operator, which on the backend "torch" consists of PyTorch's own operators."""
    return _functions[operator].body


def _owned(x: Tensor) -> Tensor:
    """x, but no view: PyTorch forbids operations in place on a view that an operator returns."""
    if not x._is_view():
        return x
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


@contextlib.contextmanager
def or_plain(backend: str) -> Iterator[None]:
    """Around the `return` of a kernel's result: if a kernel cannot be built, warns once and continues after the block.

    Args:
        backend: the operator's: "auto", or "triton", which raises instead.

    Raises:
        ValueError: a kernel cannot be built, and the backend is "triton".
    """
    try:
        yield
    except KernelUnavailable as error:
        if backend != "auto":
            raise ValueError(f"backend='triton' is set, but {error}: use 'auto' or 'reference'") from error
        if str(error) not in _warned:
            _warned.add(str(error))
            warnings.warn(f"{error}; plain PyTorch computes in its place, more slowly", RuntimeWarning, stacklevel=3)


_warned: set[str] = set()


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if a tensor has it."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


def power_of_two(x: Tensor) -> Tensor:
    """For each row of x, the power of two that scales its largest |value| into [1, 2), within x's normal numbers."""
    x = x.flatten(1)
    largest = torch.maximum(x.amax(1), -x.amin(1))
    top = math.frexp(torch.finfo(x.dtype).max)[1]
    exponent = torch.frexp(largest).exponent.clamp(3 - top, top - 1)
    return torch.exp2((1 - exponent).to(x.dtype))


def relu_mask(dy: Tensor, y: Tensor | None) -> Tensor:
    """The gradient before a ReLU with output `y`; `dy` itself if there was no ReLU."""
    return dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)


def relu_mask_(dy: Tensor, y: Tensor | None) -> Tensor:
    """The same in the memory of `dy`, which nobody else reads."""
    return dy if y is None else torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy)


def first_order_only(reason: str) -> dict[str, Any]:
    """`save` and `backward` of an operator that is a gradient and not differentiable itself, for this reason."""
    return {"save": lambda *_: None, "backward": lambda *_: refuse_second_derivative(reason)}


def refuse_second_derivative(reason: str) -> None:
    """Raises NotImplementedError with this reason."""
    raise NotImplementedError(f"{reason}; compute it under qkernels.set_backend('reference')")
