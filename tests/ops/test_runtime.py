"""Settings: who computes what, in which thread, and the errors of requests that cannot be honoured."""

import doctest
import functools
import importlib
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qkernels
from qkernels import runtime
from qkernels.ops import _library
from qkernels.runtime import device
from qkernels.runtime.device import INTERPRETED, arch_of_device
from qkernels.runtime.precision import switched
from qkernels.runtime.recording import record

CONV = torch.zeros(1, 4, 3, 3), torch.zeros(4, 1, 1, 3, 3)
LINEAR = torch.zeros(1, 2048), torch.zeros(4, 512, 512)
GRAM = torch.ones(1, 2, 5), torch.ones(1, 2, 5)
CALLS = [
    (qkernels.hamilton_conv2d, CONV),
    (qkernels.hamilton_conv_transpose2d, CONV),
    (qkernels.hamilton_linear, LINEAR),
    (qkernels.gram_cosine, GRAM),
    (qkernels.anti_transfer_loss, GRAM),
]
all_calls = pytest.mark.parametrize(("op", "args"), CALLS, ids=[op.__name__ for op, _ in CALLS])


def run(code: Any, **environment: Any) -> Any:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@all_calls
def test_backend_and_form_of_each_operator(op: Callable[..., Any], args: Any) -> None:
    forms = {"hamilton_linear": "q8", "gram_cosine": "channel", "anti_transfer_loss": "channel"}
    assert qkernels.backend_of(op, *args) == "torch"
    assert qkernels.form_of(op, *args) == forms.get(op.__name__, "dense")
    with qkernels.set_backend("reference"):
        assert qkernels.backend_of(op.__name__, *args) == "reference"
        assert qkernels.form_of(op, *args) == "einsum"


all_products = pytest.mark.parametrize(("op", "args"), CALLS[:3], ids=[op.__name__ for op, _ in CALLS[:3]])
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 lets the kernels run on a CPU")


def refused(op: Callable[..., Any], args: Any, reason: str) -> None:
    """An explicit request names what is in its way, whether something is computed or only asked."""
    with qkernels.set_backend("triton"):
        for call in (op, functools.partial(qkernels.backend_of, op), functools.partial(qkernels.form_of, op)):
            with pytest.raises(ValueError, match=f"backend='triton' is set, but .*{reason}.*use the backend 'auto'"):
                call(*args)


@all_calls
@not_interpreted
def test_triton_needs_a_gpu_or_the_interpreter(op: Callable[..., Any], args: Any) -> None:
    refused(op, args, r"x is on cpu: .* CUDA devices, or in Triton's interpreter \(TRITON_INTERPRET=1\)")


@all_calls
def test_triton_does_not_compute_float64(op: Callable[..., Any], args: Any) -> None:
    refused(op, [t.double() for t in args], "compute float32, float16 and bfloat16, not torch.float64")


@all_calls
def test_triton_must_be_installed(op: Callable[..., Any], args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "HAS_TRITON", False)
    refused(op, args, "the package triton is not installed")


@all_products
@not_interpreted
def test_meta_tensors_run_nowhere_but_on_plain_pytorch(op: Callable[..., Any], args: Any) -> None:
    meta = [t.to("meta") for t in args]
    assert qkernels.backend_of(op, *meta) == "torch"
    assert qkernels.form_of(op, *meta) == "dense"
    with qkernels.set_form("q8"):
        assert qkernels.form_of(op, *meta) == "q8"
    with qkernels.set_backend("reference"):
        assert qkernels.form_of(op, *meta) == "einsum"
    refused(op, meta, "x is on meta: the kernels run on CUDA devices")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", ["auto", "dense", "q8"])
@all_calls
def test_forced_forms(op: Callable[..., Any], args: Any, backend: str, form: str) -> None:
    """A forced form is reported, but by the reference, which has one, and by Gram cosines, which have their own."""
    default = {"hamilton_linear": "q8", "gram_cosine": "channel", "anti_transfer_loss": "channel"}.get(
        op.__name__, "dense"
    )
    with qkernels.set_backend(backend), qkernels.set_form(form):
        expected = default if form == "auto" or default == "channel" else form
        assert qkernels.form_of(op, *args) == ("einsum" if backend == "reference" else expected)
        assert qkernels.backend_of(op, *args) == ("reference" if backend == "reference" else "torch")


@all_products
def test_signed_needs_a_kernel(op: Callable[..., Any], args: Any) -> None:
    with qkernels.set_form("signed"):
        with pytest.raises(ValueError, match=f"form='signed' is set, but.* a Triton kernel.*{op.__name__}"):
            op(*args)
        with qkernels.set_backend("reference"):
            op(*args)


@all_products
def test_forms_of_the_kernels(op: Callable[..., Any], args: Any) -> None:
    """Asked for a GPU that is only planned for."""
    how = functools.partial(runtime.plan_of, op.__name__, *args)

    def refuse(form: str, dtype: torch.dtype, reason: str) -> None:
        with qkernels.set_form(form), pytest.raises(ValueError, match=f"form '{form}'.*{reason}"):
            how(dtype)

    with record(90), qkernels.set_backend("triton"):
        for dtype, precision in ((torch.float16, "half"), (torch.bfloat16, "half"), (torch.float32, "ieee")):
            with switched("ieee"):
                assert qkernels.form_of(op, *(t.to(dtype) for t in args)) in ("signed", "q8")
                with qkernels.set_form("signed"):
                    assert how(dtype) == ("triton", f"signed-{precision}")
                    assert qkernels.form_of(op, *(t.to(dtype) for t in args)) == "signed"
                refuse("dense", dtype, "plain PyTorch's")
        with switched("ieee"), qkernels.set_form("q8"):
            assert how(torch.float32) == ("triton", "q8-ieee")
        with switched("tf32"), qkernels.set_form("signed"):
            assert how(torch.float32) == ("triton", "signed-tf32")
        with switched("tf32"):
            refuse("q8", torch.float32, "without TF32")
        refuse("q8", torch.bfloat16, "float32 operands")


@pytest.mark.parametrize(
    ("setter", "name", "values"),
    [(qkernels.set_backend, "backend", ("reference", "triton")), (qkernels.set_form, "form", ("dense", "q8"))],
)
def test_setters_are_functions_and_context_managers(setter: Any, name: str, values: tuple[str, str]) -> None:
    def current() -> Any:
        return getattr(runtime._settings, name)

    try:
        setter(values[0])
        assert current() == values[0]
        with setter(values[1]):
            assert current() == values[1]
            with setter("auto"):
                assert current() == "auto"
            assert current() == values[1]
        assert current() == values[0]
        with pytest.raises(RuntimeError, match="inside"), setter(values[1]):
            raise RuntimeError("inside")
        assert current() == values[0]
    finally:
        setter("auto")


def test_setting_belongs_to_its_thread() -> None:
    seen = []
    with qkernels.set_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(qkernels.backend_of(*CALLS[0][:1], *CONV)))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_backward_follows_its_forward() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    with qkernels.set_form("q8"):
        y = qkernels.hamilton_linear(x, torch.randn(4, 3, 2))
    with qkernels.set_backend("triton"), qkernels.set_form("signed"):
        y.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qkernels.set_backend("cuda"), "backend must be one of auto, reference, triton; got 'cuda'"),
        (lambda: qkernels.set_form("q4"), "form must be one of auto, dense, signed, q8; got 'q4'"),
        (lambda: qkernels.backend_of("conv"), "op must be one of hamilton_conv2d, .*; got 'conv'"),
        (lambda: qkernels.form_of(torch.add, *CONV), "op must be one of .*; got 'add'"),
    ],
)
def test_bad_settings(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    assert runtime._settings.backend == runtime._settings.form == "auto"


def test_environment_variable() -> None:
    code = "import torch, qkernels; print(qkernels.backend_of('gram_cosine', torch.ones(1, 1), torch.ones(1, 1)))"
    assert run(code, QKERNELS_BACKEND="reference").stdout.strip() == "reference"
    error = run(code, QKERNELS_BACKEND="fast").stderr
    assert "QKERNELS_BACKEND must be one of auto, reference, triton; got 'fast'" in error


def test_import_is_light() -> None:
    """No Triton, no scientific stack, no device queried."""
    code = """
import sys, torch
before = set(sys.modules)
torch.cuda.is_available = torch.cuda.device_count = lambda: 1 / 0
sys.modules["triton"] = None
import qkernels
qkernels.nn, qkernels.anti_transfer_loss, qkernels.set_backend
heavy = {"triton", "scipy", "pandas", "sklearn", "torchaudio", "matplotlib", "torch._dynamo", "qat"}
print(sorted(heavy & (set(sys.modules) - before) - {"triton"}), torch.cuda.is_initialized())
"""
    result = run(code)
    assert result.stdout.strip() == "[] False", result.stderr


def test_environment_report() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "qkernels.runtime"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert f"torch             {torch.__version__}" in result.stdout
    assert {line.split()[0] for line in result.stdout.splitlines()} >= {"python", "triton", "cpu", "gpus", "backend"}


@pytest.mark.parametrize(
    "module",
    [
        "qkernels",
        "qkernels.algebra",
        "qkernels.functional",
        "qkernels.init",
        "qkernels.losses",
        "qkernels.nn",
        "qkernels.ops._arch",
        "qkernels.ops._strides",
        "qkernels.ops.folded_rowwise.config",
        "qkernels.ops.gram_cosine.config",
        "qkernels.ops.hamilton_conv.config",
        "qkernels.runtime",
        "qkernels.runtime.tolerances",
    ],
)
def test_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


def test_a_device_is_a_constant_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its properties are no type that Dynamo could trace."""
    torch._dynamo.reset()
    properties = types.SimpleNamespace(major=7, minor=5, multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(device, "_properties", device._properties.__wrapped__)
    compiled = torch.compile(lambda x: x + arch_of_device(x.device), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 75


def test_gradients_go_to_the_arguments_they_are_named_for() -> None:
    """Whatever stands between them, and in whatever order the backward gives them."""

    @_library.define(
        "named_gradients",
        fake=lambda inputs: torch.empty_like(inputs.x),
        save=lambda ctx, inputs, output: ctx.save_for_backward(inputs.x, inputs.y),
        backward=lambda ctx, dy: (dy * ctx.saved_tensors[0], dy * ctx.saved_tensors[1]),
        differentiable=("y", "x"),
    )
    def product(x: torch.Tensor, number: int, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return x * y

    x, y, z = (torch.full((2,), value, requires_grad=True) for value in (3.0, 5.0, 7.0))
    gradients = torch.autograd.grad(product(x, 1, y, z).sum(), (x, y, z), allow_unused=True)
    assert [None if gradient is None else gradient.tolist() for gradient in gradients] == [[5, 5], [3, 3], None]
