"""Tables against numbers worked out by hand."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from bench import grid, summary, tables
from bench.network import NO_AT
from tests.bench.measurements import CPU, LOSS, fresh_of, line_of, lines_of, measured, row, shared, steps

# Layers


def test_a_speed_up_is_of_the_fastest_baseline_that_computes_the_same() -> None:
    rows = (
        row(50.0, percent_of_roof=61.4),
        row(10.0, provider="ours signed"),  # a form that nobody gets who does not ask for it
        row(80.0, provider="concatenated, NCHW"),
        row(70.0, provider="concatenated, NHWC"),
        row(20.0, provider="real, NHWC"),  # another function
        row(30.0, provider="real, NCHW"),
        row(provider="SpeechBrain", status="REFUSED", median_us=1.0),  # a wrong result has no time
    )
    line = line_of(tables.layers([measured(*rows)]), layer="conv 2")
    assert line == {
        "layer": "conv 2", "ours": "50 µs", "best baseline": "70 µs", "by": "concatenated, NHWC", "speed-up": "1.40",
        "real layer / ours": "0.40", "% of roof": "61", "no time": "SpeechBrain: REFUSED",
    }  # fmt: skip


def test_a_loss_stands_in_the_same_column() -> None:
    text = tables.layers([measured(row(200.0), row(100.0, provider="SpeechBrain"))])
    assert line_of(text, layer="conv 2")["speed-up"] == "0.50"
    assert "1 of 1 tables" in text


@pytest.mark.parametrize("status", ["REFUSED", "out of memory", "failed"])
def test_ours_without_a_result_is_shown(status: str) -> None:
    rows = (row(status=status), row(100.0, provider="SpeechBrain"))
    line = line_of(tables.layers([measured(*rows)]), layer="conv 2")
    assert (line["ours"], line["no time"], line.get("speed-up", "")) == (status, f"ours auto: {status}", "")


def test_a_variant_with_another_baseline_counts_where_it_is_the_stronger() -> None:
    compiled = {"variant": "against torch.compile"}
    rows = [row(50.0), row(100.0, provider="SpeechBrain"), row(30.0, provider="real, NHWC")]
    rows += [row(60.0, **compiled), row(90.0, provider="torch.compile", **compiled)]
    line = line_of(tables.layers([measured(*rows)]), layer="conv 2")
    # 90 / 60, each of one case, not 90 / 50; the real layer was in the other.
    assert (line["ours"], line["by"], line["speed-up"]) == ("60 µs", "torch.compile", "1.50")
    assert line["real layer / ours"] == "0.60"
    line = line_of(tables.layers([measured(*rows[:4], replace(rows[4], median_us=300.0))]), layer="conv 2")
    assert (line["by"], line["speed-up"]) == ("SpeechBrain", "2.00")


def test_a_wide_spread_is_shown() -> None:
    text = tables.layers([measured(row(100.0, p20_us=97.5, p80_us=102.6), row(2.0, provider="b", p80_us=2.08))])
    line = line_of(text, layer="conv 2")
    assert (line["ours"], line["best baseline"]) == ("100 µs (97.5 µs to 103 µs)", "2 µs")


def test_tables_come_by_value_and_the_rest_in_short() -> None:
    combinations = [("real", 20, "bf16", "graph"), ("quaternion", 256, "bf16", "graph"),
                    ("quaternion", 20, "bf16", "eager"), ("quaternion", 20, "float32", "graph"),
                    ("quaternion", 20, "bf16", "graph")]  # fmt: skip
    rows = []
    for network, batch, precision, mode in combinations:
        names = {"network": network, "batch": batch, "precision": precision, "mode": mode}
        for layer, ours in (("conv 11-13", 50.0), ("conv 2", 200.0)):
            rows += [row(ours, layer=layer, **names), row(100.0, layer=layer, provider="b", **names)]
    text = tables.layers([measured(*rows)])
    titles = re.findall(r"^\*(.*)\*$", text, re.MULTILINE)
    assert titles[:2] == [
        "quaternion network, forward+backward, bf16, batch 20, CUDA graph",
        "quaternion network, forward+backward, bf16, batch 20, eager",
    ]
    assert len(titles) == 3
    assert "2 of 5 tables, all rows in [results/gpu/results.csv](results/gpu/results.csv)" in text
    assert "**Some GPU**: commit abc1234, PyTorch 2.11.0, 2026-11-24 20:00 UTC" in text
    # "conv 11-13" is three layers.
    cell = f"{math.exp((3 * math.log(2) + math.log(0.5)) / 4):.2f} (0.50)"
    shorts = [line for line in lines_of(text) if "" in line]
    assert len(shorts) == 4
    assert shorts[0] == {
        "": "quaternion network, batch 20, bf16",
        "forward+backward, CUDA graph": cell,
        "forward+backward, eager": cell,
    }
    assert shorts[-1]["forward+backward, eager"] == ""


def test_one_step_from_the_headline_counts_more_than_two() -> None:
    rows = [row(network="quaternion", precision="fp16", mode="eager"), row(network="real")]
    titles = re.findall(r"^\*(.*)\*$", tables.layers([measured(*rows)]), re.MULTILINE)
    assert [title.split(",")[0] for title in titles] == ["real network", "quaternion network"]


def test_layers_come_in_the_networks_order() -> None:
    names = ["linear 1", "conv 11-13", "conv 2", "conv 8", "conv 6-7"]
    text = tables.layers([measured(*(row(layer=name) for name in names))])
    assert [line["layer"] for line in lines_of(text)] == ["conv 2", "conv 6-7", "conv 8", "conv 11-13", "linear 1"]


def test_a_table_that_would_be_too_long_says_what_it_lacks() -> None:
    text = tables.layers([measured(*(row(layer=f"conv {n}") for n in range(tables.LINES + 4)))])
    assert len(lines_of(text)) == tables.LINES
    assert "4 more lines are not shown." in text


def test_a_bar_in_a_name_does_not_end_its_cell() -> None:
    text = tables.layers([measured(row(), row(provider="a|b"))])
    assert line_of(text, layer="conv 2")["by"] == r"a\|b"


# The anti-transfer loss


def test_the_loss_with_its_memory_on_a_gpu() -> None:
    rows = (
        row(10.0, **LOSS, peak_bytes=3_000_000),
        row(5.0, **{**LOSS, "provider": summary.CACHED}, peak_bytes=2_000_000),
        row(40.0, **{**LOSS, "provider": "materialised"}, peak_bytes=90_000_000),
        row(60.0, **{**LOSS, "provider": "materialised, float32"}, peak_bytes=70_000_000),
        row(10.0, **{**LOSS, "variant": "folded-rowwise"}, peak_bytes=0),
        row(**{**LOSS, "variant": "folded-rowwise", "provider": "materialised"}, status="out of memory", peak_bytes=5),
    )
    text = tables.anti_transfer([measured(*reversed(rows))])
    assert [line["loss"] for line in lines_of(text)] == ["paper", "folded-rowwise"]
    assert line_of(text, loss="paper") == {
        "loss": "paper", "layers": "1-2", "ours": "10 µs", "cached target": "5 µs", "best baseline": "40 µs",
        "by": "materialised", "speed-up": "4.00", "speed-up, cached": "8.00", "memory: ours": "3 MB",
        "memory: cached": "2 MB", "memory: least of the baselines": "70 MB", "no time": "",
    }  # fmt: skip
    folded = line_of(text, loss="folded-rowwise")
    assert folded["memory: ours"] == "0 B"
    assert (folded["memory: least of the baselines"], folded["no time"]) == ("", "materialised: out of memory")


def test_the_memory_of_a_cpu_is_what_a_fresh_process_grew_by() -> None:
    loss = {**LOSS, "suite": "cpu", "mode": "eager", "precision": "float32"}
    ours, other = row(**loss, peak_bytes=1), row(**{**loss, "provider": "materialised"}, peak_bytes=1)
    fresh = [fresh_of(ours, host_bytes=4_096_000), fresh_of(other, host_bytes=8_192_000, status="failed")]
    line = line_of(tables.anti_transfer([measured(ours, other, fresh=fresh, **CPU)]), loss="paper")
    assert line["memory: ours"] == "4.1 MB"
    assert "memory: least of the baselines" not in line  # the column is empty: a failed process has no memory
    elsewhere = fresh_of(ours, host_bytes=4_096_000, batch=256)
    assert "memory: ours" not in tables.anti_transfer([measured(ours, other, fresh=[elsewhere], **CPU)])


# Training steps and the paper


def test_steps_by_provider() -> None:
    rows = [replace(one, status="failed") if one.provider == "torch.compile" and "13" in one.layer else one
            for one in steps()]  # fmt: skip
    text = tables.step([measured(*rows)])
    first = lines_of(text)[0]
    assert first == {
        "network": "quaternion", "layer": NO_AT, "variant": "", "ours": "20 µs, 400 kB",
        "research style": "40 µs, 1.6 MB", "torch.compile": "16 µs, 256 kB", "speed-up": "0.80",
    }  # fmt: skip
    assert line_of(text, variant="cached targets")["ours"] == "21 µs, 440 kB"
    failed = line_of(text, network="quaternion", layer="AT at layer 13")
    assert (failed["torch.compile"], failed["speed-up"]) == ("failed", "4.00")
    networks = [line["network"] for line in lines_of(text)]
    assert networks == ["quaternion"] * 4 + ["real"] * 3 + ["real-on-embedding"] * 3


def test_epochs_inference_and_first_calls_stand_beside_the_steps() -> None:
    epoch = row(5e6, suite="epoch", layer=NO_AT, work="epoch", provider="ours", variant="9 samples")
    inference = row(3e3, suite="inference", layer="whole network", work="forward", provider="ours")
    fresh = [fresh_of(epoch, gpu_bytes=2_000_000, status="out of time")]
    fresh.append(fresh_of(inference, first_call_s=0.012345, cold_call_s=1234.5))
    text = tables.step([measured(*steps(), epoch, inference, fresh=fresh)])
    assert line_of(text, variant="9 samples")["ours"] == "5 s"
    assert line_of(text, layer="whole network")["ours"] == "3 ms"
    assert lines_of(text)[-2:] == [
        {"": "epoch, quaternion, no AT, 9 samples, 20, bf16, epoch", "provider": "ours", "first call": "",
         "first call, nothing compiled": "", "GPU (NVML)": "2 MB", "no result": "out of time"},
        {"": "inference, quaternion, whole network, 20, bf16, forward", "provider": "ours", "first call": "0.0123 s",
         "first call, nothing compiled": "1234 s", "GPU (NVML)": "", "no result": ""},
    ]  # fmt: skip
    assert "[results/gpu/fresh.csv](results/gpu/fresh.csv)" in text


def test_the_papers_figures_beside_ours() -> None:
    text = tables.paper([measured(*steps())])
    time = line_of(text, **{"training step": "time", "layer": NO_AT})
    best, control, ours = "best providers", "control, research style", "control, best providers"
    assert time["paper"] == "-80.5 %"
    assert time["conditions"] == "Some GPU, batch 20, bf16, CUDA graph"
    assert time[best] == "-90.0 % (torch.compile, ours)"  # 16 against 160
    assert time["both research style"] == "-80.0 %"  # 40 against 200
    assert time[ours] == "-80.0 % (ours, ours)"  # 32 against 160
    assert time[control] == "-75.0 %"  # 50 against 200
    memory = line_of(text, **{"training step": "memory", "layer": "AT at layer 2"})
    assert memory["paper"] == "-53.7 %"
    assert memory[best] == f"{100 * (22**2 / 168**2 - 1):.1f} % (ours, ours)"
    assert memory["both research style"] == f"{100 * (100**2 / 500**2 - 1):.1f} %"
    assert {line["layer"] for line in lines_of(text) if "layer" in line} == {NO_AT, "AT at layer 2"}


def test_each_precision_stands_beside_the_paper_once() -> None:
    conditions = [("bf16", "eager"), ("float32", "eager"), ("tf32", "graph"), ("float32", "graph"), ("bf16", "graph")]

    def shown(chosen: Any, **provenance: Any) -> Any:
        rows = [replace(one, precision=precision, mode=mode) for precision, mode in chosen for one in steps()]
        lines = lines_of(tables.paper([measured(*rows, **provenance)]))
        by_table = [[line["conditions"] for line in lines if name in line] for name in ("training step", "network")]
        assert set(by_table[0]) == set(by_table[1])
        return list(dict.fromkeys(by_table[0]))

    assert shown(conditions) == ["Some GPU, batch 20, bf16, CUDA graph", "Some GPU, batch 20, float32, CUDA graph"]
    assert shown(conditions[:1]) == ["Some GPU, batch 20, bf16, eager"]
    assert shown(conditions[1:2], **CPU) == ["Some CPU, 2 threads, batch 20, float32, eager"]


@pytest.mark.parametrize("status", ["REFUSED", "failed", "smoke"])
def test_no_figure_is_of_a_result_that_is_not_right(status: str) -> None:
    """Whatever numbers such a row has."""
    wrong = {"provider": "wrong", "status": status, "median_us": 0.1, "peak_bytes": 1}
    right = measured(*steps())
    fast = [replace(one, **wrong) for one in steps() if one.provider == "ours"]
    also = measured(*steps(), *fast)

    def figures(m: Any) -> Any:
        lines = lines_of(tables.paper([m]))
        return [line for line in lines if line.get("provider") not in ("wrong", "wrong, cached targets")]

    assert figures(also) == figures(right)
    gains = [[line["speed-up"] for line in lines_of(tables.step([m]))] for m in (also, right)]
    assert gains[0] == gains[1]
    loss = [row(10.0, **LOSS, peak_bytes=3000), row(40.0, **{**LOSS, "provider": "materialised"}, peak_bytes=9000)]
    line = line_of(tables.anti_transfer([measured(*loss, replace(loss[1], **wrong))]), loss="paper")
    assert (line["by"], line["speed-up"], line["memory: least of the baselines"]) == ("materialised", "4.00", "9 kB")
    assert line["no time"] == f"wrong: {status}"


def test_what_anti_transfer_costs() -> None:
    head = ("time (AT paper: 2.8x)", "memory (AT paper: up to +100 %)")
    text = tables.paper([measured(*steps())])

    def costs(network: Any, provider: Any) -> Any:
        line = line_of(text, network=network, provider=provider)
        assert line["conditions"] == "Some GPU, batch 20, bf16, CUDA graph"
        return tuple(line[name] for name in head)

    assert costs("quaternion", "ours") == ("1.10x (layer 2) to 1.50x (layer 13)", "1.21x (layer 2) to 2.25x (layer 13)")
    assert costs("quaternion", "ours, cached targets") == ("1.05x (layer 2)", "1.10x (layer 2)")
    assert costs("real", "research style")[0] == "2.50x (layer 2) to 2.80x (layer 13)"
    assert not [line for line in lines_of(text) if line.get("network") == "real-on-embedding"]


def test_what_failed_is_named_beside_the_paper() -> None:
    rows = [replace(one, status="out of memory") if one.network == "real" else one for one in steps()]
    text = tables.paper([measured(*rows)])
    time = line_of(text, **{"training step": "time", "layer": NO_AT})
    assert time["both research style"] == "not measured, real: research style out of memory"
    line = line_of(text, network="real", provider="ours")
    assert line["time (AT paper: 2.8x)"] == "not measured, layer 2 out of memory, layer 13 out of memory"


def test_trainings_side_by_side() -> None:
    lines = [shared(1, 1.0), shared(4, 2.504, peak_bytes=3_000_000), shared(4, None, mode="MPS", status="no MPS: why")]
    lines += [shared(2, 1.5), shared(1, 1.0, precision="float32")]
    text = tables.sharing([measured(row(), shared=lines), measured(row()), measured(shared=lines[:1], **CPU)])
    order = [(line["mode"], line["processes"], line["each trains"].split()[-1]) for line in lines_of(text)][:5]
    assert order == [("processes", "1", "bf16"), ("processes", "2", "bf16"), ("processes", "4", "bf16"),
                     ("MPS", "4", "bf16"), ("processes", "1", "float32")]  # fmt: skip
    case = "quaternion network, AT at layer 2, 9 samples, batch 20, bf16"
    assert line_of(text, processes="4", mode="processes") == {
        "each trains": case, "mode": "processes", "processes": "4", "threads of each": "1",
        "samples/s in total": "2504", "trainings per hour": "2.50x", "GPU allocator, each": "3 MB", "no result": "",
    }  # fmt: skip
    failed = line_of(text, mode="MPS")
    assert (failed["samples/s in total"], failed["trainings per hour"], failed["no result"]) == ("", "", "no MPS: why")
    assert re.findall(r"\*\*(.*?)\*\*: commit (\w+)", text) == [
        ("Some GPU", "def5678"), ("Some CPU, 2 threads", "def5678")
    ]  # fmt: skip
    assert "[results/gpu/sharing.csv](results/gpu/sharing.csv)" in text
    assert tables.sharing([measured(row())]) == "Not measured yet."


def test_hours_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step takes an hour, and a forward pass no time."""
    seconds = dict.fromkeys((0, *grid.MEASURED), grid.Seconds(3600.0, 0.0))
    known = {("quaternion", grid.WAYS[0]), ("quaternion", grid.SHARED), ("real", grid.SHARED)}
    monkeypatch.setattr(grid, "measured", lambda rows, *of: seconds if of in known else None)
    lines = [shared(1, 1.0), shared(8, 4.0), shared(16, 9.0, precision="float32")]
    text = tables.grid([measured(row(), shared=lines), measured(row(), **CPU)])
    own, cached, research = (list(line.values()) for line in lines_of(text))
    steps = 158 + 135 + 51 + 54 + 98 + 70  # of each corpus in both splits
    epoch = f"{steps * 53:.3g} h"
    assert own == ["Some GPU", "ours, CUDA graph", epoch, *["not measured"] * 4]
    both, hundred, beside = (f"{n * steps * 53:.3g} h" for n in (2, 200, 25))
    assert cached == ["Some GPU", "ours, cached targets, CUDA graph", epoch, epoch, both, hundred, beside]
    assert research == ["Some GPU", "research style, eager", *["not measured"] * 5]
    (of_cached,) = [line for line in lines_of(tables.grid([measured(row())])) if "cached" in line["steps"]]
    assert list(of_cached.values())[-2:] == [hundred, "not measured"]
    for words in ("636 of the paper's 642", "IEMOCAP 4490, RAVDESS 1440, TESS 2800", "70 % of a corpus", "2, 7, 13"):
        assert words in text


def test_what_is_missing_is_not_measured() -> None:
    no_real = tables.paper([measured(*(one for one in steps() if one.network == "quaternion"))])
    line = line_of(no_real, **{"training step": "time", "layer": NO_AT})
    assert line["best providers"] == line["both research style"] == line["control, best providers"] == "not measured"
    for results in ([], [measured(row())]):
        lines = lines_of(tables.paper(results))
        assert len(lines) == 3
        own = [
            value
            for line in lines
            for name, value in line.items()
            if name not in ("training step", "paper", "conditions")
        ]
        assert set(own) == {"not measured"}
    for results in ([], [measured(row(), **CPU)]):
        assert {value for line in lines_of(tables.grid(results)) for value in line.values()} == {"not measured"}
    assert tables.layers([]) == tables.anti_transfer([measured(row())]) == tables.step([]) == "Not measured yet."
