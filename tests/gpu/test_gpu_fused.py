"""ReLU and 2x2 pool inside the kernels: the outputs against PyTorch's, gradients against those behind the same gates.

Gates and positions of maxima are the kernels' own: those of an exact computation differ where values are near 0 or near
each other.
"""

import itertools

import problems
import pytest
import torch
import torch.nn.functional as F
from problems import FORMS, PRECISIONS, VGG16, Operands, Problem, poisoned

from bench.warm import compile_all
from qkernels.ops import _launch
from qkernels.ops.hamilton_conv import launch, op
from qkernels.ops.hamilton_linear import launch as linear_launch
from qkernels.runtime.tolerances import tolerance

# Layers in front of a pool, and one of odd sizes whose last row and column are in no window.
LAYERS = [VGG16[1], VGG16[5], VGG16[8]]
ODD = Problem("odd", "conv", 3, 17, 20, (9, 7), (3, 3), padding=(1, 1))
CASES = [*itertools.product(LAYERS, ["auto"], ("bf16", "float32")), *itertools.product([ODD], FORMS, PRECISIONS)]
# ReLU, pool, and a tap of the map in front of the pool.
EPILOGUES = {"relu": (True, False, False), "pool": (False, True, False), "relu pool": (True, True, False),
             "pool tap": (False, True, True), "relu pool tap": (True, True, True)}  # fmt: skip


def results(problem, operands, form, epilogue):
    """Outputs, gradients, and what came back through the pool."""
    x, weight, bias, dy = operands
    relu, pool, tap = EPILOGUES[epilogue]
    found, dpooled = {}, None
    if pool:
        pooled, code, y = launch.forward_pool(x, weight, bias, *problem.window, relu, tap, form)
        # Half of dy everywhere, but of its own values.
        dpooled = dy[:, :, 1::2, 1::2].flip(0).contiguous(memory_format=torch.channels_last)
        gradients = (dy, y if relu else None) if tap else (None, None)
        source = launch.Source(*gradients, dpooled, code)
        found = {"pooled": pooled, "code": code}
    else:
        y = launch.forward(x, weight, bias, *problem.window, relu, form)
        source = launch.Source(dy, y)
    if tap or not pool:
        found["y"] = y
    found["dx"] = launch.data_gradient(source, weight, None, problem.size, *problem.window, form)
    found["dw"], found["db"] = launch.weight_gradient(source, x, problem.kernel, *problem.window, True, form)
    return found, dpooled


@pytest.fixture(scope="module", autouse=True)
def compiled(arch):
    with _launch.record(arch) as recording:
        for (problem, form, precision), epilogue in itertools.product(CASES, EPILOGUES):
            with _launch.switched(precision):
                results(problem, problem.meta(PRECISIONS[precision]), form, epilogue)
    compile_all(recording.launches)


def routed(dpooled, code, size):
    """The pool's gradient on the map of `size`: each value at the pixel that `code` names, nowhere for code 4."""
    windows = torch.zeros(*dpooled.shape, 4, dtype=dpooled.dtype, device=dpooled.device)
    windows.scatter_(-1, code.clamp_max(3).long()[..., None], dpooled.where(code < 4, 0)[..., None])
    windows = windows.unflatten(-1, (2, 2)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return F.pad(windows, (0, size[1] - windows.shape[3], 0, size[0] - windows.shape[2]))


def maxima(y, code):
    """The pixel of each window that `code` names."""
    y = y[:, :, : y.shape[2] // 2 * 2, : y.shape[3] // 2 * 2]
    windows = y.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4, 5)
    return windows.gather(-1, code.clamp_max(3).long()[..., None])[..., 0]


def check(problem, precision, form, actual, exact):
    taken = problems.forms_taken(problem, precision, form, _launch.arch_of(actual["dx"]))
    found = []
    for name, result in actual.items():
        product = "y" if name == "pooled" else name
        allowed = tolerance(product, precision, taken[product])
        found += [f"{name}: {what}" for what in problems.violations(result, exact[name], allowed)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(
    ("problem", "form", "precision"), CASES, ids=[f"{p.name} {f} {t} seed {problems.SEED}" for p, f, t in CASES]
)
def test_epilogue(problem, form, precision, epilogue, device):
    seed = problems.seed_of(problem.name, precision)
    operands = problem.operands(PRECISIONS[precision], "gaussian", seed, device)
    relu, pool, _ = EPILOGUES[epilogue]
    with _launch.switched(precision), poisoned():
        actual, dpooled = results(problem, operands, form, epilogue)

    exact_y = problems.exact_results(problem, operands)["y"]
    exact = {"y": exact_y.relu() if relu else exact_y}
    y, dy = actual.get("y"), operands.dy
    gradient = None if y is None else dy * (y > 0) if relu else dy
    if pool:
        exact["pooled"] = F.max_pool2d(exact["y"], 2)
        pooled, code = actual["pooled"], actual.pop("code")
        assert code.max() <= (4 if relu else 3)
        assert torch.equal(code == 4, pooled == 0) if relu else (code < 4).all()
        if y is not None:
            assert torch.equal(pooled, F.max_pool2d(y, 2))
            assert torch.equal(maxima(y, code).where(code < 4, 0), pooled)
        through = routed(dpooled, code, problem.y_size)
        # Two gradients are added with one rounding to the operands' type.
        gradient = through if gradient is None else (gradient.double() + through.double()).to(dy.dtype)
    else:
        assert 0.3 < (y == 0).float().mean() < 0.7
    exact |= problems.exact_gradients(problem, operands, gradient)
    check(problem, precision, form, actual, exact)


@pytest.mark.parametrize("tap", [False, True])
def test_operator_differentiates_pool_and_map(tap, device):
    """The autograd formula, with one gradient or both, gives what the kernels give directly."""
    operands = ODD.operands(torch.bfloat16, "gaussian", problems.seed_of("operator"), device)
    epilogue = "relu pool tap" if tap else "relu pool"
    expected, dpooled = results(ODD, operands, "auto", epilogue)
    inputs = [tensor.requires_grad_() for tensor in operands[:3]]
    pooled, code, y = op.hamilton_conv2d_pool(*inputs, [1, 1], [1, 1], [1, 1], 1, True, tap, "auto")
    assert torch.equal(code, expected["code"])
    outputs, gradients = ((pooled, y), (dpooled, operands.dy)) if tap else ((pooled,), (dpooled,))
    actual = torch.autograd.grad(outputs, inputs, gradients)
    for gradient, name in zip(actual, ("dx", "dw", "db"), strict=True):
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_linear_relu(precision, form, device):
    problem = VGG16[10]
    operands = problem.operands(PRECISIONS[precision], "gaussian", problems.seed_of(problem.name, precision), device)
    x, weight, bias, dy = operands
    with _launch.switched(precision), poisoned():
        y = linear_launch.forward(x, weight, bias, True, form)
        dx = linear_launch.data_gradient(dy, y, weight, form)
        dw, db = linear_launch.weight_gradient(dy, y, x, True, form)
    exact = problems.exact_results(problem, Operands(x, weight, bias, dy * (y > 0)))
    exact["y"] = exact["y"].relu()
    check(problem, precision, form, {"y": y, "dx": dx, "dw": dw, "db": db}, exact)
