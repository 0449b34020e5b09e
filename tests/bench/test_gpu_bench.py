"""The GPU benchmark's figures and its gate, without a GPU."""

import csv
import itertools

import pytest
import torch

from bench import cases, gpu
from bench.cpu_forms import Layer

TINY = cases.Case("tiny", Layer("conv 2", 8, 12, 3, 4), 2, "float32", cases.STEP, ("graph",))
PROVENANCE = {"device", "commit", "torch", "triton", "cuda", "cudnn", "date"}


class Watch:
    """A clock that notes whom it times."""

    def __init__(self):
        self.timed = []

    def __call__(self, runs, mode):
        self.timed += runs
        return {name: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0] for name in runs}


def rows_of(provider, case=TINY, clock=None):
    return gpu.measure(case, [provider], cases.operands_of(case, torch.device("cpu")), clock, None)


def test_smoke_checks_every_provider_and_claims_no_time(tmp_path, capsys):
    assert gpu.main(["--smoke", "--out", str(tmp_path)]) == 0
    with (tmp_path / "conv.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {*gpu.Row._fields, *PROVENANCE}
    assert all(row["status"] == "smoke" and row["median_us"] == row["percent_of_roof"] == "" for row in rows)
    assert {(row["suite"], row["product"]) for row in rows} == {
        (suite, case.product) for suite, (listed, _) in cases.SUITES.items() for case in listed
    }
    assert {row["provider"] for row in rows} == {
        provider.name for _, providers in cases.SUITES.values() for provider in providers if provider.form != "q16"
    }
    with (tmp_path / "targets.csv").open() as file:
        targets = list(csv.DictReader(file))
    assert set(targets[0]) == {*gpu.Target._fields, *PROVENANCE}
    assert {target["verdict"] for target in targets} == {"not measured"}
    assert "not measured" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("product", [cases.STEP, *cases.OPERATORS])
@pytest.mark.parametrize("part", range(4))
def test_a_wrong_result_is_given_no_time(product, part):
    case = TINY._replace(product=product)
    right = cases.AUTO

    def build(case, operands):
        run = right.build(case, operands)

        def wrong():
            results = list(run())
            results[part % len(results)] = 1.001 * results[part % len(results)]
            return tuple(results)

        return wrong

    watch = Watch()
    (row,) = rows_of(right._replace(name="wrong", build=build), case, watch)
    assert row.status == "REFUSED"
    assert row.error > 1e-4
    assert row.median_us is None
    assert watch.timed == []
    (row,) = rows_of(right, case, watch)
    assert (row.status, row.p20_us, row.median_us, row.p80_us) == ("ok", 2.0, 3.5, 5.0)
    assert watch.timed == ["ours auto"]


def test_nan_is_refused():
    def build(case, operands):
        results = cases.AUTO.build(case, operands)()
        results[1][0] = float("nan")
        return lambda: results

    assert rows_of(cases.AUTO._replace(build=build))[0].status == "REFUSED"


def test_flops_are_those_of_a_count():
    """16 multiplications and as many additions for each quaternion of the output, of the input under each tap."""
    case = TINY._replace(product="forward")
    counted = 0
    for _ in itertools.product(range(2), range(12 // 4), range(4), range(4), range(8 // 4), range(3), range(3)):
        counted += 16 * 2
    assert case.flops == counted
    assert TINY.flops == 3 * counted
    linear = TINY._replace(layer=Layer("linear 1", 8, 12, 0, 1), product="forward")
    assert linear.flops == 2 * 2 * 8 * 12


def test_flops_are_pytorchs_for_the_real_layer():
    from torch.utils.flop_counter import FlopCounterMode

    run = cases.REAL[0].build(TINY, cases.operands_of(TINY, torch.device("cpu")))
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == TINY.flops


def test_targets_weigh_layers_by_their_number():
    """A speed-up of 2 everywhere but for one shape, which three layers have, where it is 1.4."""

    def row(case, provider, us):
        shape = (case.layer.name, *case.layer[1:3], case.layer.side, case.batch, case.precision, case.product)
        times = (us, us, us, case.flops, case.bytes, None)
        return gpu.Row(case.suite, *shape, "graph", provider, "ok", 0.0, 0.0, *times)

    rows = []
    for case in cases.SUITES["conv, batch 20"][0]:
        slow = 14.0 if case.layer.name == "conv 11-13" else 20.0
        rows += [
            row(case, "ours auto", 10.0),
            row(case, "concatenated, NCHW", slow),
            row(case, "concatenated, NHWC", 50.0),
        ]
    judged = {target.target: target for target in gpu.targets(rows, {})}
    target = judged["conv step against concatenated, batch 20, graph"]
    assert target.measured == f"{(2**9 * 1.4**3) ** (1 / 12):.2f}"
    assert (target.worst, target.verdict) == ("conv 11-13: 1.40", "met")
    assert judged["conv step against concatenated, batch 20, eager"].verdict == "not measured"
    # Without one of the layers there is no figure.
    incomplete = gpu.targets([r for r in rows if r.layer != "conv 2"], {})
    assert incomplete[0].verdict == "not measured"


def test_the_budget_drops_what_is_left_and_says_so(capsys):
    assert list(gpu.run_suites(torch.device("cpu"), None, None, deadline=0.0)) == []
    assert capsys.readouterr().out.count("dropped, out of budget") == sum(
        len(listed) for listed, _ in cases.SUITES.values()
    )
