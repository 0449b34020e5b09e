"""Every product of every layer shape against float64, in every precision and form; same bits in two runs."""

import itertools
from collections.abc import Iterable, Iterator

import problems
import pytest
import torch
from problems import ALGORITHMS, PRECISIONS, RANDOM, REAL_MAPS, RHEMO, VGG16, Operands, Problem, poisoned

from bench.warm import compile_all
from qkernels.runtime.recording import Launch, record
from qkernels.runtime.tolerances import tolerance

# Most combinations of shape, precision, form and type of the result are kernels of their own to compile, for 2 s each.
# All forms meet all precisions on the quaternion VGG16's shapes, with results in float32 (and the parameters too, as
# under autocast) on four; elsewhere they take turns.
WIDENED = [VGG16[1], VGG16[5], VGG16[8], VGG16[10]]

# Problem, precision, distribution of the operands, and (algorithm, whether a half type's result is float32).
Combination = tuple[Problem, str, str, list[tuple[str, bool]]]


def combinations() -> Iterator[Combination]:
    distributions, turns = itertools.cycle(problems.DISTRIBUTIONS), itertools.count()
    for problem in VGG16 + REAL_MAPS + RHEMO:
        turn = next(turns)
        for precision in PRECISIONS:
            algorithms = ALGORITHMS[precision]
            chosen = algorithms if problem in VGG16 else (algorithms[turn % len(algorithms)],)
            widths = (False, True) if problem in WIDENED and precision in ("bf16", "fp16") else (False,)
            yield problem, precision, next(distributions), list(itertools.product(chosen, widths))
        next(distributions)
    for n, problem in enumerate(RANDOM):
        for precision in ("bf16", "float32") if n % 2 else ("fp16", "tf32"):
            widened = precision in ("bf16", "fp16") and n % 4 > 1
            algorithm = ALGORITHMS[precision][n // 2 % len(ALGORITHMS[precision])]
            yield problem, precision, next(distributions), [(algorithm, widened)]
        if n % 2:
            next(distributions)


COMBINATIONS = {
    f"{problem.name} {precision} {distribution} seed {problems.SEED}": (problem, precision, distribution, modes)
    for problem, precision, distribution, modes in combinations()
}


def results_of(problem: Problem, operands: Operands, algorithm: str, widened: bool) -> dict[str, torch.Tensor]:
    if widened:
        operands = operands._replace(weight=operands.weight.float(), bias=operands.bias.float())
    dtype = torch.float32 if widened else None
    results: dict[str, torch.Tensor] = problems.kernel_results(problem, operands, algorithm, dtype)
    return results


def launches(combinations: Iterable[Combination], arch: int) -> list[Launch]:
    with record(arch) as recording:
        for problem, precision, _, modes in combinations:
            for algorithm, widened in modes:
                results_of(problem, problem.meta(PRECISIONS[precision]), algorithm, widened)
    return recording.launches


@pytest.fixture(scope="module", autouse=True)
def compiled(request: pytest.FixtureRequest, arch: int) -> None:
    """Compiles what the chosen tests need in all cores at once; otherwise it takes most of their time."""
    chosen = [
        item.callspec.params["combination"]
        for item in request.session.items
        if item.path == request.path and "combination" in item.callspec.params
    ]
    count, errors = compile_all(launches(chosen, arch))
    print(f"{count} kernels compiled, {len(errors)} failed", *errors, sep="\n")


@pytest.mark.parametrize("combination", COMBINATIONS.values(), ids=COMBINATIONS)
def test_error_against_float64(combination: Combination, device: torch.device) -> None:
    problem, precision, distribution, modes = combination
    seed = problems.seed_of(problem.name, precision, distribution)
    operands = problem.operands(PRECISIONS[precision], distribution, seed, device)
    exact = problems.exact_results(problem, operands)
    found = []
    for algorithm, widened in modes:
        with poisoned():
            results = results_of(problem, operands, algorithm, widened)
        for name, actual in results.items():
            assert actual.dtype == (torch.float32 if widened else operands.x.dtype)
            allowed = problem.slack * tolerance(name, precision, widened)
            found += [
                f"{name}, {algorithm}, {actual.dtype}: {what}"
                for what in problems.violations(actual, exact[name], allowed)
            ]
    assert not found, "\n".join([str(problem), *found])


@pytest.mark.parametrize(
    ("precision", "algorithm"),
    [(name, algorithm) for name, algorithms in ALGORITHMS.items() for algorithm in algorithms],
)
@pytest.mark.parametrize("problem", [VGG16[1], VGG16[4], VGG16[8], VGG16[10], RHEMO[0]], ids=lambda p: p.name)
def test_two_runs_give_the_same_bits(problem: Problem, precision: str, algorithm: str, device: torch.device) -> None:
    operands = problem.operands(PRECISIONS[precision], "gaussian", problems.seed_of(problem.name), device)
    first, second = (problems.kernel_results(problem, operands, algorithm) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_new_tensors_are_poisoned(device: torch.device) -> None:
    x = torch.ones(3, device=device)
    with poisoned():
        assert torch.empty(3, device=device).isnan().all()
        assert x.new_empty(3, dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(3, dtype=torch.uint8, device=device) == 255).all()
