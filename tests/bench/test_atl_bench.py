"""The anti-transfer benchmark's rows, gate and figures, without a GPU."""

import csv

import pytest
import torch

from bench import atl

TINY = atl.CASES[0]._replace(channels=8, size=(4, 3), precision="float32")


class Watch:
    """A clock that notes whom it times."""

    def __init__(self):
        self.timed = []

    def __call__(self, runs, mode):
        self.timed += runs
        return {name: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0] for name in runs}


def test_smoke_checks_every_provider_and_claims_no_time(tmp_path):
    assert atl.main(["--smoke", "--out", str(tmp_path)]) == 0
    with (tmp_path / "atl.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(atl.Row._fields) < set(rows[0])
    assert all(row["status"] == "smoke" and row["median_us"] == row["memory_bytes"] == "" for row in rows)
    assert {row["provider"] for row in rows} == {p.name for p in atl.PAPER + atl.FOLDED + atl.BASELINES}
    assert {(row["network"], row["semantics"]) for row in rows} == {
        (network, semantics) for network in ("quaternion", "real") for semantics in ("paper", "folded-rowwise")
    }
    with (tmp_path / "atl_targets.csv").open() as file:
        assert {target["verdict"] for target in csv.DictReader(file)} == {"not measured"}


@pytest.mark.parametrize("wrong_gradient", [False, True])
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_result_is_given_no_time(wrong_gradient, factor, monkeypatch):
    monkeypatch.setattr(atl, "_memory", lambda run, a: 0)

    def build(trained, frozen, semantics):
        right = atl.PAPER[0].build(trained, frozen, semantics)

        def loss(a):
            value = right(a)
            wrong = value * factor
            return wrong - (wrong - value).detach() if wrong_gradient else value + (wrong - value).detach()

        return loss

    watch = Watch()
    operands = atl.features(TINY, torch.device("cpu"), 2)
    right, wrong = atl.measure(TINY, [atl.PAPER[0], atl.Provider("wrong", build)], operands, watch)
    assert (wrong.status, wrong.median_us) == ("REFUSED", None)
    assert (right.status, right.p20_us, right.median_us, right.p80_us) == ("ok", 2.0, 3.5, 5.0)
    assert watch.timed == ["ours"]


def test_figures_compare_with_the_better_baseline():
    def row(provider, us, memory=0):
        return atl.Row(
            "quaternion", 8, 10, 512, 8, 8, 20, "bf16", "paper", provider, "ok", 0.0, 0.0, us, us, us, memory
        )

    rows = [
        row("ours", 10.0),
        row("materialised", 90.0),
        row("materialised, float32", 85.0),
        row("ours, cached target", 1.0),
    ]
    judged = {target.target: target for target in atl.targets(rows)}
    assert judged["paper, quaternion, layers 8-10: speed-up"][2:] == ("8.50", "", "met")
    assert judged["paper, quaternion: most MB beside the features"].verdict == "not measured"
    rows[1] = row("materialised", 70.0)
    assert atl.targets(rows)[3].verdict == "MISSED"
