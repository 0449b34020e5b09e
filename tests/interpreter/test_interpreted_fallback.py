"""One of an operator's kernels cannot be built: what plain PyTorch leaves serves the others, and the reverse."""

from typing import Any

import pytest
import torch
import triton
from interpreted import assert_accurate

import qkernels
from qkernels import anti_transfer_loss, gram_cosine
from qkernels.ops import _launch, _library
from qkernels.ops.folded_rowwise import kernels as folded_kernels
from qkernels.ops.folded_rowwise.op import folded_rowwise
from qkernels.ops.gram_cosine import config
from qkernels.ops.gram_cosine import kernels as gram_kernels
from qkernels.ops.gram_cosine.config import Tile
from qkernels.ops.gram_cosine.op import gram_cosine as gram_operator
from qkernels.ops.gram_cosine.op import target

pytestmark = pytest.mark.filterwarnings("ignore:Triton .* cannot build:RuntimeWarning")


class Failing:
    """In place of a kernel: it is too large for the GPU."""

    def __init__(self, kernel: Any) -> None:
        self.fn, self.__name__ = kernel.fn, kernel.__name__

    def __getitem__(self, grid: Any) -> None:
        raise triton.OutOfResources(300_000, 232_448, "shared memory")


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Takes a kernel away."""
    monkeypatch.setattr(_launch, "_failed", {})
    monkeypatch.setattr(_library, "_warned", set())

    def fail(module: Any, name: str) -> None:
        monkeypatch.setattr(module, name, Failing(getattr(module, name)))

    return fail


@pytest.fixture
def blocks_of_16(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(config, "BLOCK", dict.fromkeys(config.BLOCK, 16))
    monkeypatch.setattr(config, "_forward_tile", lambda block, *_: Tile(block, block, 16, 0, 4, 1))
    monkeypatch.setattr(config, "_backward_tile", lambda n, *_: Tile(16, n, 32, 16, 4, 1))
    config.plan.cache_clear()
    yield
    config.plan.cache_clear()


# Shape, size of the features, whether the second operand is triangles, and the kernel that the forward lacks.
GRAM = {
    "stored": ((2, 18, 5, 7), 1.0, False, "_gram_finish_kernel"),
    "stored, triangles": ((2, 18, 5, 7), 1e-8, True, "_gram_kernel"),
    "stored, one block": ((2, 9, 5, 4), 1e-8, False, "_gram_kernel"),
    "direct": ((1, 130, 12, 11), 1.0, False, "_gram_cosine_kernel"),
    "dual": ((2, 35, 3, 5), 1e-8, False, "_gram_squares_kernel"),
}


@pytest.mark.parametrize("missing", ["forward", "backward"])
@pytest.mark.parametrize(("shape", "scale", "triangles", "forward"), GRAM.values(), ids=GRAM)
def test_gram_cosine(
    shape: tuple[int, ...], scale: Any, triangles: Any, forward: Any, missing: str, fail: Any, blocks_of_16: Any
) -> None:
    fail(gram_kernels, forward if missing == "forward" else "_gram_backward_kernel")
    a, b = (scale * (torch.rand(shape) + 0.1) for _ in range(2))
    a, b = a.requires_grad_(), b.requires_grad_(not triangles)
    with qkernels.set_backend("reference"):
        a64, b64 = (x.detach().double().requires_grad_() for x in (a, b))
        cosine = gram_cosine(a64, b64)
        exact = torch.autograd.grad((cosine.square() + cosine).sum(), (a64, b64))
    values, known = target(b.detach(), "channel", False, triangles, "torch") if triangles else (b, None)
    actual, loss, *_ = gram_operator(a, values, known, triangles, "channel", False, 1.0, False, not triangles, "auto")
    torch.testing.assert_close(actual.double(), cosine, rtol=2e-6, atol=0)
    gradients = torch.autograd.grad(loss + actual.sum(), (a,) if triangles else (a, b))
    for gradient, truth in zip(gradients, exact, strict=False):
        assert_accurate(gradient, truth, 1e-5)
    assert len(_launch._failed) == len(_library._warned) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 3e-4])
@pytest.mark.parametrize("missing", ["_folded_rows_kernel", "_folded_gradient_kernel"])
@pytest.mark.parametrize("shape", [(3, 30, 4, 4), (2, 37, 4, 5)], ids=str)
def test_folded_rowwise(
    shape: tuple[int, int, int, int], missing: str, scale: float, dtype: torch.dtype, fail: Any
) -> None:
    fail(folded_kernels, missing)
    a, b = ((scale * (torch.randn(shape).relu() + 0.01)).to(dtype).requires_grad_() for _ in range(2))
    with qkernels.set_backend("reference"):
        a64, b64 = (x.detach().double().requires_grad_() for x in (a, b))
        truth = anti_transfer_loss(a64, b64, beta=32.0, loss="folded-rowwise")
        exact = torch.autograd.grad(truth, (a64, b64))
    loss, *_ = folded_rowwise(a, b, "each", 32.0**2, "auto")
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)
    for gradient, expected in zip(torch.autograd.grad(loss, (a, b)), exact, strict=True):
        assert_accurate(gradient, expected, 4e-6 if dtype == torch.float32 else 6e-4)
    assert {name for name, *_ in _launch._failed} == {missing}
