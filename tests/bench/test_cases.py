"""Layers and losses of the benchmark: their operations are counted again, their checks must refuse what is wrong."""

import importlib.util
import itertools
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import atl, layers
from bench.case import BACKWARD, FORWARD, STEP
from bench.gradients import differentiated
from bench.suites import HEADLINE, SUITES
from qkernels import anti_transfer_loss

CPU = torch.device("cpu")
CONV = layers.layer_case(layers.Layer("conv 2", 8, 12, 3, 4), "quaternion", 2, "float32", STEP)
LINEAR = layers.layer_case(layers.Layer("linear 1", 8, 12, 0, 1), "quaternion", 2, "float32", STEP)
LOSS = next(case for case in atl.ATL.cases if case.variant == "paper").tiny()
AUTO = layers.PROVIDERS[0]


def test_flops_of_a_convolution_are_those_of_a_count() -> None:
    """16 multiplications and as many additions for each quaternion of the output, of the input under each tap."""
    counted = 0
    for _ in itertools.product(range(2), range(12 // 4), range(4), range(4), range(8 // 4), range(3), range(3)):
        counted += 16 * 2
    assert replace(CONV, work=layers.PRODUCT).flops == counted
    works = {STEP: 3, BACKWARD: 2, FORWARD: 1, layers.DX: 1, layers.DW: 1}
    assert {work: replace(CONV, work=work).flops for work in works} == {w: n * counted for w, n in works.items()}
    assert replace(LINEAR, work=FORWARD).flops == 2 * 2 * 8 * 12


@pytest.mark.parametrize("case", [CONV, LINEAR, replace(CONV, work=layers.DX), replace(CONV, work=FORWARD)], ids=str)
def test_flops_are_pytorchs_for_the_real_layer(case: Any) -> None:
    real = next(provider for provider in layers.PROVIDERS if provider.real)
    run = real.build(case, case.operands(CPU))
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == case.flops


def test_bytes_are_those_of_the_tensors() -> None:
    case = replace(CONV, work=STEP, precision="bf16")
    x, weight, bias, dy, real = case.operands(CPU)
    assert real.shape == (12, 8, 3, 3)
    forward = x.nbytes + weight.nbytes + bias.nbytes + dy.nbytes
    backward = 2 * dy.nbytes + 2 * (x.nbytes + weight.nbytes) + bias.nbytes
    assert (case.bytes, replace(case, work=FORWARD).bytes) == (forward + backward, forward)
    assert replace(case, work=layers.DX).bytes == dy.nbytes + weight.nbytes + x.nbytes


class Counting:
    """Matrix products that count multiplications and additions; of a symmetric result one half."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, a: Any, b: Any, symmetric: bool = False) -> Any:
        rows, inner, columns = a.shape[0], a.shape[1], b.shape[1]
        self.flops += 2 * inner * (rows * (rows + 1) // 2 if symmetric else rows * columns)
        return a @ b


def by_rows(product: Any, a: Any, b: Any) -> Any:
    gram_a, gram_b = product(a, a.T, symmetric=True), product(b, b.T, symmetric=True)
    inner, square_a, square_b = (gram_a * gram_b).sum(), gram_a.square().sum(), gram_b.square().sum()
    scale = 4 * inner / (square_a * square_b)
    forward = product.flops
    gradient = scale * product(gram_b - inner / square_a * gram_a, a)
    return inner**2 / (square_a * square_b), gradient, (forward, product.flops - forward)


def by_columns(product: Any, a: Any, b: Any) -> Any:
    cross, gram_a, gram_b = product(b.T, a), product(a.T, a, symmetric=True), product(b.T, b, symmetric=True)
    inner, square_a, square_b = (m.square().sum() for m in (cross, gram_a, gram_b))
    scale = 4 * inner / (square_a * square_b)
    forward = product.flops
    gradient = scale * (product(b, cross) - inner / square_a * product(a, gram_a))
    return inner**2 / (square_a * square_b), gradient, (forward, product.flops - forward)


@pytest.mark.parametrize(("rows", "columns"), [(3, 7), (7, 3), (5, 5), (64, 4), (4, 64)])
def test_flops_of_the_loss_are_those_of_a_count(rows: int, columns: int) -> None:
    """Two algorithms compute loss and gradient, and count; the case has the fewer of the two."""
    a, b = torch.rand(2, rows, columns, dtype=torch.float64)
    leaf = a.clone().requires_grad_()
    loss = anti_transfer_loss(leaf[None], b[None])
    (exact,) = torch.autograd.grad(loss, leaf)
    counts = []
    for algorithm in (by_rows, by_columns):
        value, gradient, count = algorithm(Counting(), a, b)
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(gradient, exact)
        counts.append(count)
    assert atl.gram_flops(rows, columns) == min(counts, key=sum)
    case = replace(LOSS, channels=rows, size=(1, columns), batch=3)
    assert case.flops == 3 * sum(min(counts, key=sum))
    assert [replace(case, work=work).flops for work in (FORWARD, BACKWARD)] == [3 * n for n in min(counts, key=sum)]


@pytest.mark.parametrize(("rows", "columns"), [(40, 3), (6, 50)])
def test_flops_of_the_released_loss_are_those_of_a_count(rows: int, columns: int) -> None:
    a, b = torch.rand(2, rows, columns, dtype=torch.float64)
    count = Counting()
    if columns < rows:
        cross, gram_a, gram_b = count(a.T, b), count(a.T, a, symmetric=True), count(b.T, b, symmetric=True)
        parts = count(a, cross), count(a, gram_a), count(b, gram_b)
        inner, square_a, square_b = ((p * f).sum(1) for p, f in zip(parts, (b, a, b), strict=True))
        forward = count.flops
        # Of a: through the rows (two products with what is kept, both needed anew for the gradient of the columns).
        count(b, cross.T), count(a, gram_a), count(b, cross.T), count(a, gram_a), count(a.T, b), count(a.T, a)
    else:
        gram_a, gram_b = count(a, a.T, symmetric=True), count(b, b.T, symmetric=True)
        inner, square_a, square_b = (gram_a * gram_b).sum(1), gram_a.square().sum(1), gram_b.square().sum(1)
        forward = count.flops
        count(gram_a, a)
    value = (inner / (square_a * square_b).sqrt()).abs().mean().square()
    expected = anti_transfer_loss(a[None, :, None], b[None, :, None], loss="folded-rowwise")
    torch.testing.assert_close(value, expected)
    assert atl.folded_flops(rows, columns) == (forward, count.flops - forward)


@pytest.mark.parametrize("case", [CONV, LINEAR, *(replace(CONV, work=w) for w in layers.BARE), LOSS], ids=str)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("factor", [1.001, math.nan])
def test_a_wrong_part_is_refused(case: Any, part: Any, factor: Any) -> None:
    provider = atl.PROVIDERS[0] if case is LOSS else AUTO
    operands = case.operands(CPU)
    results = list(provider.read(provider.build(case, operands)()))
    excess, error = case.check(provider, operands, tuple(results))
    assert excess <= 1
    assert error < 1e-5
    results[part % len(results)] = factor * results[part % len(results)]
    assert not case.check(provider, operands, tuple(results))[0] <= 1


def test_each_set_of_operands_has_a_run_of_its_own() -> None:
    sets = [CONV.operands(CPU) for _ in range(3)]
    for provider in layers.PROVIDERS:
        if provider.fits(CONV) and provider.cpu:
            runs = [provider.build(CONV, operands) for operands in sets]
            for operands, run in zip(sets, runs, strict=True):
                assert CONV.check(provider, operands, provider.read(run()))[0] <= 1


@pytest.mark.parametrize("work", [FORWARD, BACKWARD, STEP])
def test_a_run_computes_its_work_every_time(work: Any) -> None:
    calls = []

    def cube(x: Any, y: Any) -> Any:
        calls.append(0)
        return x**3 * y

    x, y = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])
    run = differentiated(cube, (x, y), torch.tensor([1.0, 10.0]), work)
    for _ in range(2):
        value, *gradients = run()
        assert value.tolist() == [8.0, 54.0]
        assert [g.tolist() for g in gradients] == ([] if work == FORWARD else [[12.0, 540.0], [8.0, 270.0]])
    assert len(calls) == (1 if work == BACKWARD else 2)
    (_, dy) = differentiated(cube, (x, y), torch.ones(2), BACKWARD, wanted=(1,))()
    assert dy.tolist() == [8.0, 27.0]


def test_suites_have_what_they_should() -> None:
    names = {
        name: {provider.name for suite in suites for provider in suite.providers} for name, suites in SUITES.items()
    }
    assert {"ours auto", "ours signed", "ours q8", "ours dense", "torch.compile", "torch.compile, max-autotune",
            "concatenated, NHWC", "real, NHWC"} <= names["conv"]  # fmt: skip
    conv = SUITES["conv"][0].cases
    grid = {(case.network, case.batch, case.precision) for case in conv if case.work == STEP and not case.variant}
    assert grid == set(itertools.product(("quaternion", "real"), (20, 256), ("bf16", "fp16", "tf32", "float32")))
    assert len({case.layer for case in conv}) == 9
    # Forms are compared where there is a choice: the kernels' in float32, those of plain PyTorch on a CPU.
    by_form = {p.name: [case for case in conv if p.fits(case)] for p in layers.PROVIDERS if p.name.startswith("ours ")}
    assert {case.precision for name in ("ours signed", "ours q8") for case in by_form[name]} == {"float32"}
    assert by_form["ours signed"] == by_form["ours q8"]
    assert by_form["ours dense"] == []
    assert any(p.name == "ours dense" and p.fits(case) for p in layers.PROVIDERS for case in SUITES["cpu"][0].cases)
    autotuned = next(p for p in SUITES["conv"][0].providers if "autotune" in p.name)
    assert sum(autotuned.fits(case) for case in conv) == 3
    steps = {(case.network, case.layer, case.variant) for case in SUITES["step"][0].cases}
    assert len(steps) == 3 * (1 + 3 * 2) + 3  # three of them against torch.compile
    for suites in SUITES.values():
        keys = [case.case_key for suite in suites for case in suite.cases]
        assert len(keys) == len(set(keys))
        assert all(any(p.fits(case) for p in suite.providers) for suite in suites for case in suite.cases)


def test_ten_headline_cases() -> None:
    assert len({str(case) for case, _ in HEADLINE["cuda"]}) == 10
    assert all(provider.fits(case) for pairs in HEADLINE.values() for case, provider in pairs)


def test_speechbrain_leaves_pytorch_as_it_was() -> None:
    """Imported twice, as by two of its modules, its patch of the iterators of batches would call itself."""
    if not importlib.util.find_spec("speechbrain"):
        pytest.skip("SpeechBrain is not installed")
    for name in ("q_ops", "q_linear"):
        layers.speechbrain_module(name)
    assert [*torch.utils.data.DataLoader([1, 2])] == [torch.tensor([1]), torch.tensor([2])]
    assert not [name for name in sys.modules if name.partition(".")[0] == "speechbrain"]
