"""Kernels that cannot be built: PyTorch computes in their place and says so once; what CUDA reports goes through."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels
from qkernels import anti_transfer_loss, anti_transfer_tap, gram_cosine, gram_target, runtime
from qkernels.losses import FoldedRowwise, GramPosition
from qkernels.ops import _launch, _library
from qkernels.ops.folded_rowwise.op import folded_rowwise, folded_rowwise_da
from qkernels.ops.gram_cosine.op import gram_cosine as gram_operator

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

OutOfResources = triton.OutOfResources
CUDA_ERROR = "Triton Error [CUDA]: an illegal memory access was encountered"


@triton.jit
def _asserting_kernel(x_ptr, M, BLOCK: tl.constexpr):  # type: ignore[name-defined]
    tl.static_assert(BLOCK == 1, "no such block")


@triton.jit
def _misassembled_kernel(x_ptr, M, BLOCK: tl.constexpr):  # type: ignore[name-defined]
    value = tl.inline_asm_elementwise("nonsense $0, $1;", "=r,r", [tl.arange(0, BLOCK)], tl.int32, True, 1)
    tl.store(x_ptr + tl.arange(0, BLOCK), value)


@triton.jit
def _copying_kernel(x_ptr, M, BLOCK: tl.constexpr):  # type: ignore[name-defined]
    at = x_ptr + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at))


class Compiled:
    """A kernel whose launch compiles it for a GPU that is not there, as Triton's own does, and then raises `error`."""

    def __init__(self, kernel: Any, error: Any = None) -> None:
        self.kernel, self.error, self.launches = kernel, error, 0
        self.fn, self.__name__ = kernel.fn, kernel.__name__

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *, num_warps: Any, num_stages: Any, **arguments: Any) -> None:
        self.launches += 1
        source = triton.compiler.ASTSource(
            fn=self.kernel,
            signature={"x_ptr": "*i32", "M": "i32", "BLOCK": "constexpr"},
            constexprs={"BLOCK": arguments["BLOCK"]},
        )
        triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
        if self.error:
            raise self.error


class Failing:
    """In place of a kernel of ours: its launch raises."""

    def __init__(self, kernel: Any, error: Any) -> None:
        self.error, self.launches, self.fn, self.__name__ = error, 0, kernel.fn, kernel.__name__

    def __getitem__(self, grid: Any) -> None:
        self.launches += 1
        raise self.error


@pytest.fixture(autouse=True)
def nothing_failed_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_launch, "_failed", {})
    monkeypatch.setattr(_library, "_warned", set())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def run(kernel: Any, block: int = 32, size: int = 5) -> None:
    _launch.run(kernel, (1,), {"x_ptr": torch.zeros(block, dtype=torch.int32), "M": size, "BLOCK": block})


@pytest.fixture
def no_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's passes fail as those of Triton 3.6.0 did on two kernels of ours (isOpBefore)."""

    def fail(*_: Any) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr("triton.backends.nvidia.compiler.CUDABackend.make_ttgir", fail)


def named(text: Any, name: str, reason: str) -> Any:
    """Whether it is one line of what could not be had, from whom and why."""
    version, settings = re.escape(triton.__version__), "BLOCK=32, num_warps=4, num_stages=1"
    return re.fullmatch(rf"Triton {version} cannot build {name} for sm_90 and int32 with {settings}: {reason}", text)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (_asserting_kernel, "CompileTimeAssertionFailure: no such block"),
        (_misassembled_kernel, "PTXASError: Internal Triton PTX codegen error"),
    ],
)
def test_a_failed_build_is_named_and_not_tried_again(kernel: Any, reason: str) -> None:
    compiled = Compiled(kernel)
    for size in (5, 5, 6):
        with pytest.raises(_launch.KernelUnavailable) as error:
            run(compiled, size=size)
        assert named(str(error.value), kernel.__name__, reason)
    assert compiled.launches == 1
    with pytest.raises(_launch.KernelUnavailable, match="BLOCK=64"):
        run(compiled, 64)


def test_failed_passes_are_a_failed_build(no_passes: Any) -> None:
    with pytest.raises(_launch.KernelUnavailable) as error:
        run(Compiled(_copying_kernel))
    assert named(str(error.value), "_copying_kernel", "RuntimeError: PassManager::run failed")


def test_too_much_for_the_gpu_is_a_failed_build() -> None:
    with pytest.raises(_launch.KernelUnavailable) as error:
        run(Compiled(_copying_kernel, OutOfResources(300_000, 232_448, "shared memory")))
    assert named(str(error.value), "_copying_kernel", "OutOfResources: out of resource: shared memory, .*")


def test_a_missing_c_compiler_is_a_failed_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")

    class Launcher(Compiled):
        def launch(self, **_: Any) -> None:
            triton.runtime.build.compile_module_from_src("int x;", "launcher")

    with pytest.raises(_launch.KernelUnavailable) as error:
        run(Launcher(_copying_kernel))
    assert named(str(error.value), "_copying_kernel", "CalledProcessError: Command .*/bin/false.*")


@pytest.mark.parametrize("error", [RuntimeError(CUDA_ERROR), torch.OutOfMemoryError("no memory"), ValueError("x")])
def test_errors_of_a_launch_go_through(error: Any) -> None:
    compiled = Compiled(_copying_kernel, error)
    for _ in range(2):
        with pytest.raises(type(error)) as raised:
            run(compiled)
        assert raised.value is error
    assert compiled.launches == 2


def features(*shape: Any) -> Any:
    return torch.rand(shape, requires_grad=True), torch.rand(shape)


LOSSES = {
    "stored": ((3, 8, 4, 4), lambda a, b: gram_cosine(a, b).square().sum()),
    "direct": ((2, 130, 12, 12), anti_transfer_loss),
    "dual": ((2, 40, 4, 4), lambda a, b: anti_transfer_loss(a, b, loss=GramPosition(centred=True))),
    "packed": ((2, 6, 8, 8), lambda a, b: anti_transfer_loss(a, gram_target(b))),
    "tap": ((2, 8, 4, 4), lambda a, b: sum(part.sum() for part in anti_transfer_tap(a, b))),
    "folded": ((4, 16, 3, 3), lambda a, b: anti_transfer_loss(a, b, loss=FoldedRowwise("product"))),
}
all_losses = pytest.mark.parametrize(("shape", "loss"), LOSSES.values(), ids=LOSSES)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those of the losses fail with `error` (default: they are too large), on tensors that look as if on a GPU."""
    from qkernels.ops.folded_rowwise import kernels as folded
    from qkernels.ops.gram_cosine import kernels as gram

    def fail(error: Any = None) -> Any:
        error = error or OutOfResources(300_000, 232_448, "shared memory")
        failing = {}
        for module in (gram, folded):
            for name in [name for name in vars(module) if re.fullmatch("_(gram|folded)_.*_kernel|_gram_kernel", name)]:
                failing[name] = Failing(getattr(module, name), error)
                monkeypatch.setattr(module, name, failing[name])
        return failing

    def backend_of(*_: Any, **__: Any) -> Any:
        return "reference" if runtime._settings.backend == "reference" else "triton"

    monkeypatch.setattr(runtime, "backend_of", backend_of)
    return fail


@all_losses
def test_plain_pytorch_computes_in_their_place(
    shape: tuple[int, ...], loss: Callable[..., torch.Tensor], kernels: Any
) -> None:
    kernels()
    a, b = features(*shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            value = loss(a, b)
            (gradient,) = torch.autograd.grad(value, a)
    with qkernels.set_backend("reference"):
        exact = loss(a, b)
    (exact_gradient,) = torch.autograd.grad(exact, a)
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient, exact_gradient)
    # Once for the first kernel of the forward and of the backward, which are all that was tried.
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == len(set(texts)) == 2
    version = re.escape(triton.__version__)
    for text in texts:
        assert re.match(rf"Triton {version} cannot build _\w+_kernel for sm_90 and float32(, int32)? with ", text)
        assert "BLOCK" in text
        assert "num_warps=" in text
        assert text.endswith("; plain PyTorch computes in its place, more slowly")
        assert "\n" not in text


@all_losses
def test_triton_that_was_asked_for_is_an_error_of_one_line(
    shape: tuple[int, ...], loss: Callable[..., torch.Tensor], kernels: Any
) -> None:
    kernels()
    with (
        qkernels.set_backend("triton"),
        pytest.raises(ValueError, match="backend='triton' is set, but") as error,
    ):
        loss(*features(*shape))
    assert triton.__version__ in str(error.value)
    assert "\n" not in str(error.value)


@all_losses
def test_a_broken_gpu_stays_an_error(shape: tuple[int, ...], loss: Callable[..., torch.Tensor], kernels: Any) -> None:
    failing = kernels(RuntimeError(CUDA_ERROR))
    a, b = features(*shape)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=re.escape(CUDA_ERROR)):
            loss(a, b)
    assert sum(kernel.launches for kernel in failing.values()) == 2


@pytest.mark.filterwarnings("ignore:Triton .* cannot build:RuntimeWarning")
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("rows", [9, 70, 130])
def test_gram_operator_keeps_its_shapes(rows: int, both: bool, kernels: Any) -> None:
    """Those that `torch.compile` was promised: the kernels'."""
    kernels()
    a, b = (torch.rand(2, rows, 12, 12, requires_grad=needed) for needed in (True, both))
    torch.library.opcheck(gram_operator, (a, b, None, False, "channel", False, 0.7, True, both, "auto"))


@pytest.mark.filterwarnings("ignore:Triton .* cannot build:RuntimeWarning")
@pytest.mark.parametrize("positions", [(3, 3), (4, 4), (5, 5), (8, 8)])
def test_folded_operator_keeps_its_shapes(positions: tuple[int, int], kernels: Any) -> None:
    kernels()
    a, b = (torch.rand(3, 50, *positions, requires_grad=True) for _ in range(2))
    torch.library.opcheck(folded_rowwise, (a, b, "each", 0.7, "auto"))
    with torch.no_grad():
        loss, *rest = folded_rowwise(a, b, "each", 0.7, "auto")
        torch.library.opcheck(folded_rowwise_da, (loss, b, a, *rest, 1, 0.7, "auto"))


def test_weights_that_cannot_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' first kernel: in plain PyTorch, or an error, as the layer's backend says."""
    from qkernels.ops.hamilton_conv import forms
    from qkernels.ops.hamilton_conv import kernels as conv

    failing = Failing(conv._hamilton_pack_kernel, OutOfResources(300_000, 232_448, "shared memory"))
    monkeypatch.setattr(conv, "_hamilton_pack_kernel", failing)
    weight = torch.rand(4, 5, 3, 2, 2)
    with pytest.warns(RuntimeWarning, match="plain PyTorch computes in its place"):
        tiles, _ = torch.ops.qkernels.hamilton_pack([weight], "signed-ieee", weight.dtype, "auto")
    assert torch.equal(tiles, forms.pack(weight, "signed-ieee", weight.dtype))
    with pytest.raises(ValueError, match="backend='triton' is set, but"):
        torch.ops.qkernels.hamilton_pack([weight], "signed-ieee", weight.dtype, "triton")


def test_what_operators_take_for_a_backend() -> None:
    assert runtime.operator_backend("triton") == "auto"
    assert runtime.operator_backend("torch") == "torch"
    with qkernels.set_backend("triton"):
        assert runtime.operator_backend("triton") == "triton"
