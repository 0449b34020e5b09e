"""Every kernel once on small odd shapes, for compute-sanitizer; operands come from the CPU: little else runs."""

import problems
import torch

from qkernels.ops.hamilton_conv import launch

CONV = problems.Problem("odd", "conv", 2, 17, 20, (6, 5), (3, 3), padding=(1, 1))
GROUPED = problems.Problem("strided", "conv", 1, 6, 4, (9, 8), (4, 2), (3, 2), (1, 0), (1, 1), 2)
RUNS = [
    *(
        (CONV, algorithm, precision)
        for precision, algorithms in problems.ALGORITHMS.items()
        if precision != "fp16"
        for algorithm in algorithms
    ),
    (GROUPED, "signed-half", "bf16"),
    (GROUPED, "q8-ieee", "float32"),
]


def run(problem: problems.Problem, operands: problems.Operands, algorithm: str) -> None:
    """Products of a plain layer, and of one with a ReLU, a pool and a tap, behind another's ReLU."""
    x, weight, bias, dy = operands
    window = problem.window
    problems.kernel_results(problem, operands, algorithm)
    pooled, argmax, y = launch.forward_pool(x, weight, window, algorithm, launch.Epilogue(bias, True), None, True)
    gradient = launch.epilogue_gradient(dy, y, pooled, argmax, problem.y_size, 1.0, dy.dtype)
    launch.data_gradient(gradient, weight, problem.size, window, algorithm, launch.Epilogue(relu_output=x))
    launch.weight_gradient(gradient, x, problem.kernel, window, True, algorithm)


def main() -> None:
    for problem, algorithm, precision in RUNS:
        operands = problem.operands(problems.PRECISIONS[precision], "gaussian", problems.SEED, torch.device("cpu"))
        run(problem, problems.Operands(*(tensor.cuda() for tensor in operands)), algorithm)
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
