"""Every product of every layer shape against float64, in every precision and form; same bits in two runs."""

import itertools

import problems
import pytest
import torch
from problems import FORMS, PRECISIONS, RANDOM, REAL_MAPS, RHEMO, VGG16, poisoned

from bench.warm import compile_all
from qkernels.ops import _launch
from qkernels.runtime.tolerances import tolerance

# Most combinations of shape, precision, form and type of the result are kernels of their own to compile, for 2 s each.
# All forms meet all precisions on the quaternion VGG16's shapes, with results in float32 on four; elsewhere they take
# turns.
MODES = ("auto", *FORMS)
WIDENED = [VGG16[1], VGG16[5], VGG16[8], VGG16[10]]


def combinations():
    """Problem, precision, distribution of the operands, and (form, whether a half type's result is float32)."""
    distributions, forms = itertools.cycle(problems.DISTRIBUTIONS), itertools.cycle(FORMS)
    for problem in VGG16 + REAL_MAPS + RHEMO:
        for precision in PRECISIONS:
            chosen = MODES if problem in VGG16 else ("auto", next(forms))
            widths = (False, True) if problem in WIDENED and precision in ("bf16", "fp16") else (False,)
            yield problem, precision, next(distributions), list(itertools.product(chosen, widths))
        next(distributions)
        next(forms)
    for n, problem in enumerate(RANDOM):
        for precision in ("bf16", "float32") if n % 2 else ("fp16", "tf32"):
            widened = precision in ("bf16", "fp16") and n % 4 > 1
            yield problem, precision, next(distributions), [(next(forms), widened)]
        if n % 2:
            next(distributions)


COMBINATIONS = {
    f"{problem.name} {precision} {distribution} seed {problems.SEED}": (problem, precision, distribution, modes)
    for problem, precision, distribution, modes in combinations()
}


def launches(combinations, arch):
    with _launch.record(arch) as recording:
        for problem, precision, _, modes in combinations:
            operands = problem.meta(PRECISIONS[precision])
            for form, widened in modes:
                with _launch.switched(precision):
                    problems.kernel_results(problem, operands, form, torch.float32 if widened else None)
    return recording.launches


@pytest.fixture(scope="module", autouse=True)
def compiled(request, arch):
    """Compiles what the chosen tests need in all cores at once; otherwise it takes most of their time."""
    chosen = [
        item.callspec.params["combination"]
        for item in request.session.items
        if item.path == request.path and "combination" in item.callspec.params
    ]
    count, errors = compile_all(launches(chosen, arch))
    print(f"{count} kernels compiled, {len(errors)} failed", *errors, sep="\n")


@pytest.mark.parametrize("combination", COMBINATIONS.values(), ids=COMBINATIONS)
def test_error_against_float64(combination, device, arch):
    problem, precision, distribution, modes = combination
    seed = problems.seed_of(problem.name, precision, distribution)
    operands = problem.operands(PRECISIONS[precision], distribution, seed, device)
    exact = problems.exact_results(problem, operands)
    found = []
    for form, widened in modes:
        taken = problems.forms_taken(problem, precision, form, arch)
        with _launch.switched(precision), poisoned():
            results = problems.kernel_results(problem, operands, form, torch.float32 if widened else None)
        for name, actual in results.items():
            assert actual.dtype == (torch.float32 if widened else operands.x.dtype)
            allowed = problem.slack * tolerance(name, precision, taken[name], widened)
            found += [
                f"{name}, {form} ({taken[name]}), {actual.dtype}: {what}"
                for what in problems.violations(actual, exact[name], allowed)
            ]
    assert not found, "\n".join([str(problem), *found])


@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("problem", [VGG16[1], VGG16[4], VGG16[8], VGG16[10], RHEMO[0]], ids=lambda p: p.name)
def test_two_runs_give_the_same_bits(problem, precision, form, device):
    operands = problem.operands(PRECISIONS[precision], "gaussian", problems.seed_of(problem.name), device)
    with _launch.switched(precision):
        first, second = (problems.kernel_results(problem, operands, form) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_new_tensors_are_poisoned(device):
    x = torch.ones(3, device=device)
    with poisoned():
        assert torch.empty(3, device=device).isnan().all()
        assert x.new_empty(3, dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(3, dtype=torch.uint8, device=device) == 255).all()
