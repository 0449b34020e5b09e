"""The choice of the backend and the form that compute an operator.

A setting holds for the current thread; new threads start with the defaults. The environment variable QKERNELS_BACKEND
sets the default backend of all threads. A backward pass uses the settings of its forward, except under activation
checkpointing on a GPU, which recomputes the forward in a thread of autograd, with the defaults. Only devices that hold
tensors are queried.
"""

import importlib.util
import math
import os
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qkernels import checks
from qkernels.losses import told
from qkernels.ops.gram_cosine.config import gram_form
from qkernels.ops.hamilton_conv.config import FORMS as KERNEL_FORMS
from qkernels.ops.hamilton_conv.config import algorithm_of, cpu_form
from qkernels.runtime.device import INTERPRETED, arch_of, arch_of_device
from qkernels.runtime.precision import precision_of
from qkernels.runtime.recording import current_recording

BACKENDS = ("auto", "reference", "triton")
FORMS = ("auto", *KERNEL_FORMS)
OPERATORS = ("hamilton_conv2d", "hamilton_conv_transpose2d", "hamilton_linear", "gram_cosine", "anti_transfer_loss")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = importlib.util.find_spec("triton") is not None


_DEFAULT_BACKEND: str = checks.option("QKERNELS_BACKEND", os.environ.get("QKERNELS_BACKEND", "auto"), BACKENDS)


# threading.local, as torch.compile does not trace and guard a ContextVar; without defaults in the class, which code
# compiled by torch 2.11 would see for ever.
class _Settings(threading.local):
    def __init__(self) -> None:
        self.backend, self.form = _DEFAULT_BACKEND, "auto"


_settings = _Settings()


class _Restore:
    """Result of a setter: at the end of a `with` block it restores the setting."""

    def __init__(self, name: str, previous: str) -> None:
        self.name, self.previous = name, previous

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        setattr(_settings, self.name, self.previous)


def set_backend(backend: str) -> _Restore:
    """Sets the backend of the current thread, from now on or for a `with` block.

    Args:
        backend: "auto", the fastest one for the tensors, with plain PyTorch and one warning in place of a kernel that
            cannot be built; "reference", the einsum definition; "triton", the kernels, or an error if there is none.

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
    _settings.backend = checks.option("backend", backend, BACKENDS)
    return _Restore("backend", previous)


def settings() -> tuple[str, str]:
    """The backend and the form of the current thread."""
    return _settings.backend, _settings.form


def set_form(form: str) -> _Restore:
    """Sets the form of Hamilton products in the current thread, from now on or for a `with` block.

    Args:
        form: "auto", a pure function of shape, type and architecture; "dense", one product with the weight expanded to
            a real one (plain PyTorch only); "signed", the 16 component products as one (Triton only); "q8", the 8
            products of the fast algorithm (on Triton for float32 without TF32 only). The reference backend ignores it.

    Returns:
        A context manager that restores the previous form.

    Raises:
        ValueError: unknown form.
    """
    previous = _settings.form
    _settings.form = checks.option("form", form, FORMS)
    return _Restore("form", previous)


def backend_of(op: str | Callable[..., Any], *args: Any, obstacle: str | None = None) -> str:
    """The backend that would compute ``op(*args)`` with the present settings.

    Args:
        op: a public function of this package, or its name.
        args: its arguments, tensors first.
        obstacle: reason why the kernels cannot compute it, if that depends on other arguments.

    Returns:
        "reference" (einsum), "torch" (plain PyTorch) or "triton" (fused kernels).

    Raises:
        ValueError: unknown operator, or the backend "triton" for something that it cannot compute.
    """
    name = _name_of(op)
    if not args or not isinstance(args[0], Tensor):
        raise TypeError(f"args must begin with a tensor, as those of {name}; got {told(args)}")
    if _settings.backend == "reference":
        return "reference"
    if _settings.backend == "auto" and not args[0].is_cuda:  # the interpreter is for tests
        return "torch"
    obstacle = obstacle or _obstacle(*(arg for arg in args if isinstance(arg, Tensor)))
    if _settings.backend == "triton":
        if obstacle:
            raise ValueError(
                f"backend='triton' is set, but {obstacle}: use the backend 'auto' (the fastest available) "
                "or 'reference'"
            )
        return "triton"
    return "torch" if obstacle else "triton"


def needs_own_operators() -> bool:
    """Whether only PyTorch's own operators will do: under `torch.export` (and ONNX), and within `torch.func`."""
    if torch.compiler.is_dynamo_compiling():  # which takes the operators of this package, and cannot ask what follows
        return False
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


def operator_backend(backend: str) -> str:
    """The operators' `backend` for a result of `backend_of`: "auto" if plain PyTorch may replace Triton's kernels."""
    return "auto" if backend == "triton" and _settings.backend == "auto" else backend


def _obstacle(x: Tensor, *rest: Tensor) -> str | None:
    """The reason why the Triton kernels cannot compute with these tensors, if any."""
    if needs_own_operators():
        return "torch.export and torch.func take PyTorch's own operators"
    if not HAS_TRITON:
        return "the package triton is not installed"
    for tensor in (x, *rest):
        if tensor.dtype not in KERNEL_DTYPES:
            return f"the kernels compute float32, float16 and bfloat16, not {tensor.dtype}"
    if x.is_cuda and torch.version.hip:
        return "the kernels are for NVIDIA GPUs"
    if x.is_cuda:
        arch = arch_of_device(x.device)
        return None if arch >= 80 else f"the kernels need compute capability 8.0, and {x.device} has {arch / 10}"
    if current_recording() or (x.device.type == "cpu" and INTERPRETED):
        return None
    return f"x is on {x.device}: the kernels run on CUDA devices, or in Triton's interpreter (TRITON_INTERPRET=1)"


def form_of(op: str | Callable[..., Any], *args: Any) -> str:
    """The form in which ``op(*args)`` would be computed with the present settings.

    Args:
        op: a public function of this package, or its name.
        args: its arguments, tensors first.

    Returns:
        "einsum" for the reference backend; "dense", "signed" or "q8" for a Hamilton product; "channel" (C x C) or
        "position" (N x N) for the Gram cosine.

    Raises:
        ValueError: unknown operator, or a form that the backend does not have.
    """
    name, of_features = _name_of(op), ("gram_cosine", "anti_transfer_loss")
    if not args or not isinstance(args[0], Tensor):
        raise TypeError(f"args must begin with a tensor, as those of {name}; got {told(args)}")
    if name in of_features:
        checks.features(args[0], args[0], "args[0]", "args[0]")
    else:
        checks.layers([(name, args[1] if len(args) > 1 else None)])
    if backend_of(name, *args) == "reference":
        return "einsum"
    if name in of_features:
        samples, channels, *positions = args[0].shape
        return gram_form("channel", samples, channels, math.prod(positions))
    return plan_of(name, args[0], args[1], args[0].dtype)[1].partition("-")[0]


def plan_of(
    name: str, x: Tensor, weight: Tensor, dtype: torch.dtype, size: Sequence[int] | None = None
) -> tuple[str, str]:
    """The backend of a Hamilton product and its algorithm: the form, on the Triton backend with the precision.

    x will be cast to `dtype`; `size` are height and width of the input, if x is another layer's. PyTorch's TF32
    switches are read here, so that a backward multiplies as its forward; `torch.compile` reads them when it compiles
    the function.

    Raises:
        ValueError: as for `backend_of` and `form_of`.
    """
    backend, form = backend_of(name, x, weight), _settings.form
    if backend == "reference":
        return backend, "einsum"
    if backend == "triton":
        return backend, _kernels_algorithm(name, form, tuple(weight.shape), dtype, x.device)
    if form == "signed":
        raise ValueError(
            f"form='signed' is set, but it needs a Triton kernel, and {name} is computed by plain PyTorch here "
            f"({_obstacle(x) or 'backend auto on a CPU'}): use 'dense', 'q8' or 'auto'"
        )
    if needs_own_operators():
        return backend, "real"
    return backend, _automatic_form(name, x, weight, dtype, size) if form == "auto" else form


def _kernels_algorithm(name: str, form: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    precision = precision_of(dtype, "matmul" if name == "hamilton_linear" else "conv")
    _, p, q, *kernel = shape
    return algorithm_of(form, p, q, math.prod(kernel), precision, arch_of(device))


_kernels_algorithm._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see arch_of_device


def _automatic_form(name: str, x: Tensor, weight: Tensor, dtype: torch.dtype, size: Sequence[int] | None) -> str:
    # q8 would have to widen half types; on a GPU its eight small products only cost launches.
    if x.device.type != "cpu" or dtype in (torch.float16, torch.bfloat16):
        return "dense"
    _, p, *columns = weight.shape
    if name == "hamilton_linear":
        return cpu_form(p, math.prod(columns))
    q, *kernel = columns
    return cpu_form(p, q, math.prod(kernel), math.prod(size or x.shape[2:]))


def _name_of(op: str | Callable[..., Any]) -> str:
    return str(checks.option("op", getattr(op, "__name__", op), OPERATORS))
