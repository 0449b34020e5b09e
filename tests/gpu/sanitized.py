"""Every kernel once on small odd shapes, for compute-sanitizer; operands come from the CPU: little else runs."""

import itertools

import problems
import torch

from qkernels.ops.hamilton_conv import launch

CONV = problems.Problem("odd", "conv", 2, 17, 20, (6, 5), (3, 3), padding=(1, 1))
GROUPED = problems.Problem("strided", "conv", 1, 6, 4, (9, 8), (4, 2), (3, 2), (1, 0), (1, 1), 2)
RUNS = [
    *itertools.product([CONV], problems.FORMS, ("bf16", "float32")),
    (GROUPED, "dense", "bf16"),
    (GROUPED, "q8", "float32"),
]


def run(problem, operands, form):
    """Products of a plain layer, and of one with a ReLU, a pool and a tap."""
    x, weight, bias, dy = operands
    problems.kernel_results(problem, operands, form)
    pooled, code, y = launch.forward_pool(x, weight, bias, *problem.window, True, True, form)
    source = launch.Source(dy, y, pooled, code)
    launch.data_gradient(source, weight, None, problem.size, *problem.window, form)
    launch.weight_gradient(source, x, problem.kernel, *problem.window, True, form)


def main():
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    for problem, form, precision in RUNS:
        operands = problem.operands(problems.PRECISIONS[precision], "gaussian", problems.SEED, torch.device("cpu"))
        run(problem, problems.Operands(*(tensor.cuda() for tensor in operands)), form)
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
