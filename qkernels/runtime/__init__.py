"""Which backend and which form compute an operator.

A setting belongs to the current thread, as with `torch.set_grad_enabled`; new threads start from the
defaults. The environment variable QKERNELS_BACKEND sets the default backend of all threads. No device is
queried here.
"""

import math
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qkernels.ops.gram_cosine.config import gram_form
from qkernels.ops.hamilton_conv.config import cpu_form

BACKENDS = ("auto", "reference", "triton")
FORMS = ("auto", "dense", "q16", "q8")
OPERATORS = (
    "hamilton_conv2d",
    "hamilton_conv_transpose2d",
    "hamilton_linear",
    "gram_cosine",
    "anti_transfer_loss",
)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


# threading.local and not a ContextVar: torch.compile traces and guards the former only.
class _Settings(threading.local):
    backend = _one_of("QKERNELS_BACKEND", os.environ.get("QKERNELS_BACKEND", "auto"), BACKENDS)
    form = "auto"


_settings = _Settings()


class _Restore:
    """What a setter returns: used in a `with` statement, it restores the setting at the end."""

    def __init__(self, name: str, previous: str) -> None:
        self.name, self.previous = name, previous

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        setattr(_settings, self.name, self.previous)


def set_backend(backend: str) -> _Restore:
    """Chooses what computes the operators, from now on or for a `with` block; for the current thread.

    Args:
        backend: "auto" takes the fastest that the tensors allow, "reference" the einsum definition, "triton"
            the kernels, with an error where there is none.

    Returns:
        A context manager that restores the previous backend.

    Raises:
        ValueError: unknown backend.

    >>> import torch, qkernels
    >>> with set_backend("reference"):
    ...     backend_of("hamilton_linear", torch.ones(1, 8), torch.ones(4, 2, 2))
    'reference'
    """
    previous = _settings.backend
    _settings.backend = _one_of("backend", backend, BACKENDS)
    return _Restore("backend", previous)


def set_form(form: str) -> _Restore:
    """Chooses how Hamilton products are computed, from now on or for a `with` block; for the current thread.

    Args:
        form: "auto" is a pure function of the shape; "dense" expands the weight to a real one; "q16" takes
            the 16 component products, "q8" the 8 of the fast algorithm. The reference backend ignores it.

    Returns:
        A context manager that restores the previous form.

    Raises:
        ValueError: unknown form.
    """
    previous = _settings.form
    _settings.form = _one_of("form", form, FORMS)
    return _Restore("form", previous)


def backend_of(op: str | Callable[..., Any], *args: Any) -> str:
    """What would compute ``op(*args)`` under the present settings.

    Args:
        op: a public function of this package, or its name.
        args: its arguments, tensors first.

    Returns:
        "reference" (einsum) or "torch" (plain PyTorch).

    Raises:
        ValueError: unknown operator, or the backend "triton" where it cannot be honoured.
    """
    name = _name_of(op)
    if _settings.backend == "triton":
        raise ValueError(
            f"backend 'triton' was asked for, but {name} has no Triton kernel yet: "
            "use the backend 'auto' (fastest plain PyTorch) or 'reference'"
        )
    return "reference" if _settings.backend == "reference" else "torch"


def form_of(op: str | Callable[..., Any], *args: Any) -> str:
    """How ``op(*args)`` would be computed under the present settings.

    Args:
        op: a public function of this package, or its name.
        args: its arguments, tensors first.

    Returns:
        "einsum" for the reference backend; "dense" or "q8" for a Hamilton product; "channel" (C x C) or
        "position" (N x N) for the Gram cosine.

    Raises:
        ValueError: unknown operator, or a form that the backend does not have.
    """
    name = _name_of(op)
    if backend_of(name, *args) == "reference":
        return "einsum"
    if name in ("gram_cosine", "anti_transfer_loss"):
        return gram_form(args[0].shape[1], args[0].shape[2:].numel())
    if _settings.form == "q16":
        raise ValueError(
            f"form 'q16' was asked for, but it needs a Triton kernel, which {name} has not yet: "
            "use 'dense', 'q8' or 'auto'"
        )
    return _automatic_form(name, args[0], args[1]) if _settings.form == "auto" else _settings.form


def _automatic_form(name: str, x: Tensor, weight: Tensor) -> str:
    # Half types keep the operands as stored; q8 would have to widen them. On a GPU eight thin products only
    # cost launches.
    if x.device.type != "cpu" or x.dtype in (torch.float16, torch.bfloat16):
        return "dense"
    _, p, q, *kernel = weight.shape
    return cpu_form(p, q, math.prod(kernel), math.prod(x.shape[2:]) if kernel else 1)


def _name_of(op: str | Callable[..., Any]) -> str:
    return _one_of("op", op if isinstance(op, str) else op.__name__, OPERATORS)
