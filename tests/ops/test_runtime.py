"""Settings: who computes what, in which thread, and the errors of requests that cannot be honoured."""

import doctest
import importlib
import os
import subprocess
import sys
import threading

import pytest
import torch

import qkernels
from qkernels import runtime

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


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@all_calls
def test_backend_and_form_of_each_operator(op, args):
    forms = {"hamilton_linear": "q8", "gram_cosine": "channel", "anti_transfer_loss": "channel"}
    assert qkernels.backend_of(op, *args) == "torch"
    assert qkernels.form_of(op, *args) == forms.get(op.__name__, "dense")
    with qkernels.set_backend("reference"):
        assert qkernels.backend_of(op.__name__, *args) == "reference"
        assert qkernels.form_of(op, *args) == "einsum"


@all_calls
def test_triton_that_cannot_be_honoured(op, args):
    with qkernels.set_backend("triton"):
        with pytest.raises(ValueError, match=r"backend 'triton' was asked for, but .*has no Triton kernel yet"):
            op(*args)
        with pytest.raises(ValueError, match="backend 'triton' was asked for"):
            qkernels.backend_of(op, *args)


@pytest.mark.parametrize(("op", "args"), CALLS[:3], ids=[op.__name__ for op, _ in CALLS[:3]])
def test_q16_needs_a_kernel(op, args):
    with qkernels.set_form("q16"):
        with pytest.raises(ValueError, match=f"form 'q16' was asked for, but it needs a Triton kernel.*{op.__name__}"):
            op(*args)
        with qkernels.set_backend("reference"):
            op(*args)


@pytest.mark.parametrize(
    ("setter", "name", "values"),
    [(qkernels.set_backend, "backend", ("reference", "triton")), (qkernels.set_form, "form", ("dense", "q8"))],
)
def test_setters_are_functions_and_context_managers(setter, name, values):
    def current():
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


def test_setting_belongs_to_its_thread():
    seen = []
    with qkernels.set_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(qkernels.backend_of(*CALLS[0][:1], *CONV)))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_backward_follows_its_forward():
    x = torch.randn(2, 8, requires_grad=True)
    with qkernels.set_form("q8"):
        y = qkernels.hamilton_linear(x, torch.randn(4, 3, 2))
    with qkernels.set_backend("triton"), qkernels.set_form("q16"):
        y.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qkernels.set_backend("cuda"), "backend must be one of auto, reference, triton; got 'cuda'"),
        (lambda: qkernels.set_form("q4"), "form must be one of auto, dense, q16, q8; got 'q4'"),
        (lambda: qkernels.backend_of("conv"), "op must be one of hamilton_conv2d, .*; got 'conv'"),
        (lambda: qkernels.form_of(torch.add, *CONV), "op must be one of .*; got 'add'"),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert runtime._settings.backend == runtime._settings.form == "auto"


def test_environment_variable():
    code = "import torch, qkernels; print(qkernels.backend_of('gram_cosine', torch.ones(1, 1), torch.ones(1, 1)))"
    assert run(code, QKERNELS_BACKEND="reference").stdout.strip() == "reference"
    error = run(code, QKERNELS_BACKEND="fast").stderr
    assert "QKERNELS_BACKEND must be one of auto, reference, triton; got 'fast'" in error


def test_import_is_light():
    """No Triton, no scientific stack, no device queried."""
    code = """
import sys, torch
before = set(sys.modules)
torch.cuda.is_available = torch.cuda.device_count = lambda: 1 / 0
sys.modules["triton"] = None
import qkernels
heavy = {"triton", "scipy", "pandas", "sklearn", "torchaudio", "matplotlib", "torch._dynamo", "qat"}
print(sorted(heavy & (set(sys.modules) - before) - {"triton"}), torch.cuda.is_initialized())
"""
    result = run(code)
    assert result.stdout.strip() == "[] False", result.stderr


def test_environment_report():
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
        "qkernels.nn",
        "qkernels.ops.gram_cosine.config",
        "qkernels.ops.hamilton_conv.config",
        "qkernels.runtime",
    ],
)
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0
