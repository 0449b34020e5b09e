"""ReLU, dropout and 2x2 pool inside the kernels: outputs against PyTorch's, gradients against those behind the same
masks.

Masks and positions of maxima are the kernels' own: those of an exact computation differ where values are near 0 or near
each other.
"""

import itertools

import problems
import pytest
import torch
import torch.nn.functional as F
from problems import ALGORITHMS, PRECISIONS, VGG16, Operands, Problem, poisoned
from torch import Tensor

from bench.warm import compile_all
from qkernels.ops.hamilton_conv import launch, op
from qkernels.ops.hamilton_conv.launch import Epilogue
from qkernels.runtime.recording import record
from qkernels.runtime.tolerances import tolerance

# Layers in front of a pool, and one of odd sizes whose last row and column are in no window.
LAYERS = [VGG16[1], VGG16[5], VGG16[8]]
ODD = Problem("odd", "conv", 3, 17, 20, (9, 7), (3, 3), padding=(1, 1))
CASES = [
    *((layer, precision, ALGORITHMS[precision][-1]) for layer in LAYERS for precision in ("bf16", "float32")),
    *((ODD, precision, algorithm) for precision, algorithms in ALGORITHMS.items() for algorithm in algorithms),
]
# ReLU, pool, and a tap of the map in front of the pool.
EPILOGUES = {"relu": (True, False, False), "pool": (False, True, False), "relu pool": (True, True, False),
             "pool tap": (False, True, True), "relu pool tap": (True, True, True)}  # fmt: skip


def results(
    problem: Problem, operands: Operands, algorithm: str, epilogue: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Outputs, gradients (that by x goes through the mask of x, as if it were a ReLU's output), the pool's gradient."""
    x, weight, bias, dy = operands
    relu, pool, tap = EPILOGUES[epilogue]
    found, dpooled, argmax = {}, None, None
    if pool:
        pooled, argmax, y = launch.forward_pool(x, weight, problem.window, algorithm, Epilogue(bias, relu), None, tap)
        # Half of dy everywhere, but of its own values.
        dpooled = dy[:, :, 1::2, 1::2].flip(0).contiguous(memory_format=torch.channels_last)
        found = {"pooled": pooled, "argmax": argmax}
    else:
        y = launch.forward(x, weight, problem.window, algorithm, Epilogue(bias, relu))
    if tap or not pool:
        found["y"] = y
    of_map = dy if "y" in found else None, y if relu and "y" in found else None
    gradient = launch.epilogue_gradient(*of_map, dpooled, argmax, problem.y_size, 1.0, dy.dtype)
    found["dx"] = launch.data_gradient(
        gradient, weight, problem.size, problem.window, algorithm, Epilogue(relu_output=x)
    )
    found["dw"], found["db"] = launch.weight_gradient(gradient, x, problem.kernel, problem.window, True, algorithm)
    return found, dpooled


@pytest.fixture(scope="module", autouse=True)
def compiled(arch: int) -> None:
    with record(arch) as recording:
        for (problem, precision, algorithm), epilogue in itertools.product(CASES, EPILOGUES):
            results(problem, problem.meta(PRECISIONS[precision]), algorithm, epilogue)
    compile_all(recording.launches)


def routed(dpooled: Tensor, argmax: Tensor, size: tuple[int, int]) -> Tensor:
    """The pool's gradient on the map of `size`: each value at the pixel that `argmax` names, nowhere for argmax 4."""
    windows = torch.zeros(*dpooled.shape, 4, dtype=dpooled.dtype, device=dpooled.device)
    windows.scatter_(-1, argmax.clamp_max(3).long()[..., None], dpooled.where(argmax < 4, 0)[..., None])
    windows = windows.unflatten(-1, (2, 2)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return F.pad(windows, (0, size[1] - windows.shape[3], 0, size[0] - windows.shape[2]))


def maxima(y: Tensor, argmax: Tensor) -> Tensor:
    """The pixel of each window that `argmax` names."""
    y = y[:, :, : y.shape[2] // 2 * 2, : y.shape[3] // 2 * 2]
    windows: Tensor = y.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4, 5)
    return windows.gather(-1, argmax.clamp_max(3).long()[..., None])[..., 0]


def check(precision: str, actual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    found = []
    for name, result in actual.items():
        allowed = tolerance("y" if name == "pooled" else name, precision)
        found += [f"{name}: {what}" for what in problems.violations(result, exact[name], allowed)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(
    ("problem", "precision", "algorithm"), CASES, ids=[f"{p.name} {t} {h} seed {problems.SEED}" for p, t, h in CASES]
)
def test_epilogue(problem: Problem, precision: str, algorithm: str, epilogue: str, device: torch.device) -> None:
    seed = problems.seed_of(problem.name, precision)
    operands = problem.operands(PRECISIONS[precision], "gaussian", seed, device)
    relu, pool, _ = EPILOGUES[epilogue]
    with poisoned():
        actual, dpooled = results(problem, operands, algorithm, epilogue)

    exact_y = problems.exact_results(problem, operands)["y"]
    exact = {"y": exact_y.relu() if relu else exact_y}
    y, dy = actual.get("y"), operands.dy
    gradient = None if y is None else dy * (y > 0) if relu else dy
    if pool:
        exact["pooled"] = F.max_pool2d(exact["y"], 2)
        pooled, argmax = actual["pooled"], actual.pop("argmax")
        assert argmax.max() <= (4 if relu else 3)
        assert torch.equal(argmax == 4, pooled == 0) if relu else (argmax < 4).all()
        if y is not None:
            assert torch.equal(pooled, F.max_pool2d(y, 2))
            assert torch.equal(maxima(y, argmax).where(argmax < 4, 0), pooled)
        through = routed(dpooled, argmax, problem.y_size)
        # Two gradients are added with one rounding to the operands' type.
        gradient = through if gradient is None else (gradient.double() + through.double()).to(dy.dtype)
    else:
        assert 0.3 < (y == 0).float().mean() < 0.7
    exact |= problems.exact_gradients(problem, operands, gradient)
    exact["dx"] = exact["dx"] * (operands.x > 0)
    check(precision, actual, exact)


@pytest.mark.parametrize("tap", [False, True])
def test_operator_differentiates_pool_and_map(tap: bool, device: torch.device) -> None:
    """The autograd formula, with one gradient or both, gives what the kernels give directly."""
    operands = ODD.operands(torch.bfloat16, "gaussian", problems.seed_of("operator"), device)
    epilogue = "relu pool tap" if tap else "relu pool"
    expected, dpooled = results(ODD, operands, "signed-half", epilogue)
    inputs = [tensor.requires_grad_() for tensor in operands[:3]]
    options = (ODD.window, True, tap, True, "triton", "signed-half")
    pooled, argmax, y = op.hamilton_conv2d_pool(*inputs, None, None, *options)
    assert torch.equal(argmax, expected["argmax"])
    outputs, gradients = ((pooled, y), (dpooled, operands.dy)) if tap else ((pooled,), (dpooled,))
    actual = torch.autograd.grad(outputs, inputs, gradients)
    for gradient, name in zip(actual, ("dx", "dw", "db"), strict=True):
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.5, 0.3])
@pytest.mark.parametrize(
    ("precision", "algorithm"),
    [(name, algorithm) for name, algorithms in ALGORITHMS.items() for algorithm in algorithms],
)
def test_linear_relu_and_dropout(precision: str, algorithm: str, dropout: float, device: torch.device) -> None:
    """Both have one mask; what a dropout leaves is multiplied, and so is the gradient."""
    problem, scale = VGG16[10], 1 / (1 - dropout)
    operands = problem.operands(PRECISIONS[precision], "gaussian", problems.seed_of(problem.name, precision), device)
    x, weight, bias, dy = problems.as_convolution(operands)
    window, seed = problem.window, torch.tensor([problems.SEED], device=device)
    dropped = (seed, scale) if dropout else (None, 1.0)
    with poisoned():
        y = launch.forward(x, weight, window, algorithm, Epilogue(bias, True, *dropped))
        plain = launch.forward(x, weight, window, algorithm, Epilogue(bias, True))
        again = launch.forward(x, weight, window, algorithm, Epilogue(bias, True, *dropped))
        other = launch.forward(x, weight, window, algorithm, Epilogue(bias, True, seed + 1, scale))
        gradient = launch.epilogue_gradient(dy, y, None, None, (1, 1), scale, dy.dtype)
        dx = launch.data_gradient(gradient, weight, (1, 1), window, algorithm)
        dw, db = launch.weight_gradient(gradient, x, (1, 1), window, True, algorithm)
    assert torch.equal(y, again)
    assert torch.equal(y, other) == (dropout == 0)
    share = ((y == 0) & (plain > 0)).sum() / (plain > 0).sum()
    assert abs(share.item() - dropout) < 0.02  # of 40,000 elements: 8 standard deviations
    torch.testing.assert_close(gradient, (dy.float() * (y > 0) * scale).to(dy.dtype))
    exact = problems.exact_results(problem, operands._replace(dy=gradient.flatten(1)))
    exact["y"] = exact["y"].relu() * (y.flatten(1) > 0) * scale
    results = {"y": y.flatten(1), "dx": dx.flatten(1), "dw": dw.flatten(2), "db": db}
    check(precision, results, exact)
