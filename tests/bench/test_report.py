"""Tables and charts against numbers worked out by hand, and a README between its markers."""

import csv
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench import report
from bench.results import Results, Row, write

GPU = {"device": "Some GPU", "threads": "16", "commit": "abc1234", "torch": "2.11.0", "date": "2026-11-24 20:00 UTC"}
CPU = {**GPU, "device": "cpu: Some CPU", "threads": "2"}
STEP = {"suite": "step", "layer": report.NO_AT, "work": "step", "provider": "ours"}
LOSS = {"suite": "atl", "layer": "layers 1-2", "variant": "paper", "provider": "ours"}


def row(median=100.0, **fields) -> Row:
    """A right row, p20 and p80 on its median; another status has no time."""
    plain = {
        "suite": "conv", "network": "quaternion", "layer": "conv 2", "variant": "", "batch": 20, "precision": "bf16",
        "work": "forward+backward", "mode": "graph", "provider": "ours auto", "shape": "", "status": "ok",
        "flops": 10**9, "bytes": 10**7,
    }  # fmt: skip
    times = dict.fromkeys(("median_us", "p20_us", "p80_us"), median if fields.get("status", "ok") == "ok" else None)
    return Row(**{**dict.fromkeys(Row._fields), **plain, **times, **fields})


def measured(*rows, fresh=(), **provenance) -> report.Measured:
    lines = {tuple(line[field] for field in report.FRESH_CASE): line for line in fresh}
    return report.Measured(Path("results/gpu/results.csv"), Results(list(rows), {**GPU, **provenance}), lines)


def fresh_line(of: Row, **values) -> dict[str, str]:
    names = {field: str(getattr(of, field)) for field in report.FRESH_CASE}
    return {**names, "status": "ok", "first_call_s": "", **dict.fromkeys(report.FRESH_BYTES, ""), **values}


def lines_of(text: str) -> list[dict[str, str]]:
    """The lines of all Markdown tables, by their head; of columns of one name the first is meant, the next has a 2."""
    found = []
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        head, rule, *body = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()
        ]
        assert set(rule) == {"---"}
        names = [name if name not in head[:n] else f"{name} 2" for n, name in enumerate(head)]
        found += [dict(zip(names, line, strict=True)) for line in body]
    return found


def line_of(text: str, **cells) -> dict[str, str]:
    (line,) = [line for line in lines_of(text) if all(line.get(name) == value for name, value in cells.items())]
    return line


# Layers


def test_a_speed_up_is_of_the_fastest_baseline_that_computes_the_same():
    rows = (
        row(50.0, percent_of_roof=61.4),
        row(10.0, provider="ours q16"),  # a form that nobody gets who does not ask for it
        row(80.0, provider="concatenated, NCHW"),
        row(70.0, provider="concatenated, NHWC"),
        row(20.0, provider="real, NHWC"),  # another function
        row(30.0, provider="real, NCHW"),
        row(provider="SpeechBrain", status="REFUSED", median_us=1.0),  # a wrong result has no time
    )
    line = line_of(report.layers([measured(*rows)]), layer="conv 2")
    assert line == {
        "layer": "conv 2", "ours": "50 µs", "best baseline": "70 µs", "by": "concatenated, NHWC", "speed-up": "1.40",
        "real layer / ours": "0.40", "% of roof": "61", "no time": "SpeechBrain: REFUSED",
    }  # fmt: skip


def test_a_loss_stands_in_the_same_column():
    text = report.layers([measured(row(200.0), row(100.0, provider="SpeechBrain"))])
    assert line_of(text, layer="conv 2")["speed-up"] == "0.50"
    assert "1 of 1 tables" in text


@pytest.mark.parametrize("status", ["REFUSED", "out of memory", "failed"])
def test_ours_without_a_result_is_shown(status):
    rows = (row(status=status), row(100.0, provider="SpeechBrain"))
    line = line_of(report.layers([measured(*rows)]), layer="conv 2")
    assert (line["ours"], line["no time"], line.get("speed-up", "")) == (status, f"ours auto: {status}", "")


def test_a_variant_with_another_baseline_counts_where_it_is_the_stronger():
    compiled = {"variant": "against torch.compile"}
    rows = [row(50.0), row(100.0, provider="SpeechBrain"), row(30.0, provider="real, NHWC")]
    rows += [row(60.0, **compiled), row(90.0, provider="torch.compile", **compiled)]
    line = line_of(report.layers([measured(*rows)]), layer="conv 2")
    # 90 / 60, each of one case, not 90 / 50; the real layer was in the other.
    assert (line["ours"], line["by"], line["speed-up"]) == ("60 µs", "torch.compile", "1.50")
    assert line["real layer / ours"] == "0.60"
    line = line_of(report.layers([measured(*rows[:4], rows[4]._replace(median_us=300.0))]), layer="conv 2")
    assert (line["by"], line["speed-up"]) == ("SpeechBrain", "2.00")


def test_a_wide_spread_is_shown():
    text = report.layers([measured(row(100.0, p20_us=97.5, p80_us=102.6), row(2.0, provider="b", p80_us=2.08))])
    line = line_of(text, layer="conv 2")
    assert (line["ours"], line["best baseline"]) == ("100 µs (97.5 µs to 103 µs)", "2 µs")


def test_tables_come_by_value_and_the_rest_in_short():
    combinations = [("real", 20, "bf16", "graph"), ("quaternion", 256, "bf16", "graph"),
                    ("quaternion", 20, "bf16", "eager"), ("quaternion", 20, "float32", "graph"),
                    ("quaternion", 20, "bf16", "graph")]  # fmt: skip
    rows = []
    for network, batch, precision, mode in combinations:
        names = {"network": network, "batch": batch, "precision": precision, "mode": mode}
        for layer, ours in (("conv 11-13", 50.0), ("conv 2", 200.0)):
            rows += [row(ours, layer=layer, **names), row(100.0, layer=layer, provider="b", **names)]
    text = report.layers([measured(*rows)])
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


def test_one_step_from_the_headline_counts_more_than_two():
    rows = [row(network="quaternion", precision="fp16", mode="eager"), row(network="real")]
    titles = re.findall(r"^\*(.*)\*$", report.layers([measured(*rows)]), re.MULTILINE)
    assert [title.split(",")[0] for title in titles] == ["real network", "quaternion network"]


def test_layers_come_in_the_networks_order():
    names = ["linear 1", "conv 11-13", "conv 2", "conv 8", "conv 6-7"]
    text = report.layers([measured(*(row(layer=name) for name in names))])
    assert [line["layer"] for line in lines_of(text)] == ["conv 2", "conv 6-7", "conv 8", "conv 11-13", "linear 1"]


def test_rows_of_a_cpu_belong_where_their_layer_says():
    rows = {
        "layers": row(suite="cpu"),
        "anti-transfer": row(suite="cpu", layer="layers 8-10", variant="paper", provider="ours"),
        "step": row(suite="cpu", layer="AT at layer 2", work="step"),
        "epoch": row(suite="cpu", layer=report.NO_AT, work="epoch", variant="width 1/8"),
        "inference": row(suite="cpu", layer="whole network", work="forward"),
    }
    m = measured(*rows.values(), **CPU)
    for kind, expected in rows.items():
        assert m.rows(kind) == [expected]
    assert "**Some CPU, 2 threads**" in report.layers([m])
    assert report.kind_of(row(suite="epoch", layer=report.NO_AT, work="epoch")) == "epoch"


def test_a_table_that_would_be_too_long_says_what_it_lacks():
    text = report.layers([measured(*(row(layer=f"conv {n}") for n in range(report.LINES + 4)))])
    assert len(lines_of(text)) == report.LINES
    assert "4 more lines are not shown." in text


def test_a_bar_in_a_name_does_not_end_its_cell():
    text = report.layers([measured(row(), row(provider="a|b"))])
    assert line_of(text, layer="conv 2")["by"] == r"a\|b"


# The anti-transfer loss


def test_the_loss_with_its_memory_on_a_gpu():
    rows = (
        row(10.0, **LOSS, peak_bytes=3_000_000),
        row(5.0, **{**LOSS, "provider": report.CACHED}, peak_bytes=2_000_000),
        row(40.0, **{**LOSS, "provider": "materialised"}, peak_bytes=90_000_000),
        row(60.0, **{**LOSS, "provider": "materialised, float32"}, peak_bytes=70_000_000),
        row(10.0, **{**LOSS, "variant": "folded-rowwise"}, peak_bytes=0),
        row(**{**LOSS, "variant": "folded-rowwise", "provider": "materialised"}, status="out of memory", peak_bytes=5),
    )
    text = report.anti_transfer([measured(*reversed(rows))])
    assert [line["loss"] for line in lines_of(text)] == ["paper", "folded-rowwise"]
    assert line_of(text, loss="paper") == {
        "loss": "paper", "layers": "1-2", "ours": "10 µs", "cached target": "5 µs", "best baseline": "40 µs",
        "by": "materialised", "speed-up": "4.00", "cached": "8.00", "memory: ours": "3 MB", "cached 2": "2 MB",
        "least of the baselines": "70 MB", "no time": "",
    }  # fmt: skip
    folded = line_of(text, loss="folded-rowwise")
    assert folded["memory: ours"] == "0 B"
    assert (folded["least of the baselines"], folded["no time"]) == ("", "materialised: out of memory")


def test_the_memory_of_a_cpu_is_what_a_fresh_process_grew_by():
    loss = {**LOSS, "suite": "cpu", "mode": "eager", "precision": "float32"}
    ours, other = row(**loss, peak_bytes=1), row(**{**loss, "provider": "materialised"}, peak_bytes=1)
    fresh = [fresh_line(ours, host_bytes="4096000"), fresh_line(other, host_bytes="8192000", status="failed")]
    line = line_of(report.anti_transfer([measured(ours, other, fresh=fresh, **CPU)]), loss="paper")
    assert line["memory: ours"] == "4.1 MB"
    assert "least of the baselines" not in line  # the column is empty: a failed process has no memory
    elsewhere = fresh_line(ours, host_bytes="4096000", batch="256")
    assert "memory: ours" not in report.anti_transfer([measured(ours, other, fresh=[elsewhere], **CPU)])


# Training steps and the paper


def steps() -> list[Row]:
    """Microseconds and bytes of steps of three networks by provider, with and without anti-transfer."""
    times = {
        ("quaternion", "ours"): (20.0, 22.0, 30.0), ("quaternion", "research style"): (40.0, 100.0, 120.0),
        ("quaternion", "torch.compile"): (16.0, 25.0, 27.0),
        ("real", "ours"): (160.0, 168.0, 200.0), ("real", "research style"): (200.0, 500.0, 560.0),
        ("real-on-embedding", "ours"): (32.0, 33.0, 35.0), ("real-on-embedding", "research style"): (50.0, 60.0, 70.0),
    }  # fmt: skip
    rows = []
    for (network, provider), values in times.items():
        for layer, us in zip((report.NO_AT, "AT at layer 2", "AT at layer 13"), values, strict=True):
            names = {**STEP, "network": network, "provider": provider, "layer": layer}
            rows.append(row(us, **names, peak_bytes=int(us * us) * 1000))
    cached = {**STEP, "layer": "AT at layer 2", "variant": "cached targets"}
    part = row(1.0, **{**STEP, "work": "forward"}, peak_bytes=1)  # no step
    return [*rows, row(21.0, **cached, peak_bytes=440_000), part]


def test_steps_by_provider():
    rows = [one._replace(status="failed") if one.provider == "torch.compile" and "13" in one.layer else one
            for one in steps()]  # fmt: skip
    text = report.step([measured(*rows)])
    first = lines_of(text)[0]
    assert first == {
        "network": "quaternion", "layer": report.NO_AT, "variant": "", "ours": "20 µs, 400 kB",
        "research style": "40 µs, 1.6 MB", "torch.compile": "16 µs, 256 kB", "speed-up": "0.80",
    }  # fmt: skip
    assert line_of(text, variant="cached targets")["ours"] == "21 µs, 440 kB"
    failed = line_of(text, network="quaternion", layer="AT at layer 13")
    assert (failed["torch.compile"], failed["speed-up"]) == ("failed", "4.00")
    networks = [line["network"] for line in lines_of(text)]
    assert networks == ["quaternion"] * 4 + ["real"] * 3 + ["real-on-embedding"] * 3


def test_epochs_inference_and_first_calls_stand_beside_the_steps():
    epoch = row(5e6, suite="epoch", layer=report.NO_AT, work="epoch", provider="ours", variant="9 samples")
    inference = row(3e3, suite="inference", layer="whole network", work="forward", provider="ours")
    fresh = [fresh_line(epoch, first_call_s="2.5", gpu_bytes="2000000", status="out of time")]
    text = report.step([measured(*steps(), epoch, inference, fresh=fresh)])
    assert line_of(text, variant="9 samples")["ours"] == "5 s"
    assert line_of(text, layer="whole network")["ours"] == "3 ms"
    first = lines_of(text)[-1]
    assert first["provider"] == "ours"
    assert first["seconds to the first result"] == "2.5"
    assert (first["GPU (NVML)"], first["no result"]) == ("2 MB", "out of time")
    assert first[""].startswith("epoch, quaternion, no AT, 9 samples, 20")


def test_the_papers_figures_beside_ours():
    text = report.paper([measured(*steps())])
    time = line_of(text, **{"training step": "time", "layer": report.NO_AT})
    best, control = "best providers", "control: real on the embedding"
    assert time["paper"] == "-80.5 %"
    assert time["conditions"] == "Some GPU, batch 20, bf16, CUDA graph"
    assert time[best] == "-90.0 % (torch.compile, ours)"  # 16 against 160
    assert time["both research style"] == "-80.0 %"  # 40 against 200
    assert time[control] == "-80.0 % (ours, ours)"  # 32 against 160
    assert time[f"{control} 2"] == "-75.0 %"  # 50 against 200
    memory = line_of(text, **{"training step": "memory", "layer": "AT at layer 2"})
    assert memory["paper"] == "-53.7 %"
    assert memory[best] == f"{100 * (22**2 / 168**2 - 1):.1f} % (ours, ours)"
    assert memory["both research style"] == f"{100 * (100**2 / 500**2 - 1):.1f} %"
    assert {line["layer"] for line in lines_of(text) if "layer" in line} == {report.NO_AT, "AT at layer 2"}


def test_what_anti_transfer_costs():
    head = ("time (AT paper: 2.8x)", "memory (AT paper: up to +100 %)")
    text = report.paper([measured(*steps())])

    def costs(network, provider):
        line = line_of(text, network=network, provider=provider)
        assert line["conditions"] == "Some GPU, batch 20, bf16, CUDA graph"
        return tuple(line[name] for name in head)

    assert costs("quaternion", "ours") == ("1.10x (layer 2) to 1.50x (layer 13)", "1.21x (layer 2) to 2.25x (layer 13)")
    assert costs("quaternion", "ours, cached targets") == ("1.05x (layer 2)", "1.10x (layer 2)")
    assert costs("real", "research style")[0] == "2.50x (layer 2) to 2.80x (layer 13)"
    assert not [line for line in lines_of(text) if line.get("network") == "real-on-embedding"]


def test_what_failed_is_named_beside_the_paper():
    rows = [one._replace(status="out of memory") if one.network == "real" else one for one in steps()]
    text = report.paper([measured(*rows)])
    time = line_of(text, **{"training step": "time", "layer": report.NO_AT})
    assert time["both research style"] == "not measured, real: research style out of memory"
    line = line_of(text, network="real", provider="ours")
    assert line["time (AT paper: 2.8x)"] == "not measured, layer 2 out of memory, layer 13 out of memory"


def test_what_is_missing_is_not_measured():
    no_real = report.paper([measured(*(one for one in steps() if one.network == "quaternion"))])
    line = line_of(no_real, **{"training step": "time", "layer": report.NO_AT})
    assert (
        line["best providers"]
        == line["both research style"]
        == line["control: real on the embedding"]
        == "not measured"
    )
    for results in ([], [measured(row())]):
        lines = lines_of(report.paper(results))
        assert len(lines) == 3
        own = [
            value
            for line in lines
            for name, value in line.items()
            if name not in ("training step", "paper", "conditions")
        ]
        assert set(own) == {"not measured"}
    assert report.layers([]) == report.anti_transfer([measured(row())]) == report.step([]) == "Not measured yet."


def test_parts_of_a_step():
    def of(times, **fields):
        return report.parts(row(us, **{**STEP, "layer": "AT at layer 2", **fields, "work": work}) for work, us in times)

    works = list(zip(report.WORKS, (5.0, 20.0, 60.0, 70.0), strict=True))
    assert of(works) == [5.0, 15.0, 40.0, 10.0]
    assert of(works[1:]) is None
    assert of(works[1:], layer=report.NO_AT) == of(works[1:], variant="cached targets") == [0.0, 20.0, 40.0, 10.0]
    assert of(works[:3]) is None
    assert of([*works[:2], works[3]]) is None
    assert of(works, status="failed") is None
    # By noise forward + backward took longer than the whole step.
    assert of([*works[:2], (report.WORKS[2], 71.0), works[3]]) == [5.0, 15.0, 50.0, 0.0]


# Charts


def everything(**provenance) -> report.Measured:
    rows = [row(50.0, layer=layer) for layer in ("conv 2", "conv 6-7")]
    rows += [
        row(80.0, layer="conv 2", provider="concatenated, NHWC"),
        row(90.0, layer="conv 6-7", provider="SpeechBrain"),
    ]
    rows += [row(layer="conv 2", provider="SpeechBrain", status="REFUSED")]
    rows += [row(10.0, **LOSS, peak_bytes=3_000_000)]
    rows += [row(**{**LOSS, "provider": "materialised"}, status="out of memory")]
    for network in ("quaternion", "real"):
        for work, us in zip(report.WORKS, (5.0, 20.0, 60.0, 70_000.0), strict=True):
            rows.append(row(us, **{**STEP, "layer": "AT at layer 2", "work": work, "network": network}))
    rows.append(row(**{**STEP, "layer": "AT at layer 2", "provider": "research style"}, status="failed"))
    return measured(*rows, roof_bandwidth="4e12", roof_bf16="8e14", **provenance)


def charts_of(*results) -> dict[str, set[str]]:
    """The texts of each chart, by its file; each must be SVG."""
    drawn = {}
    for (_, file), svg in report.charts(results).items():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        drawn[file] = {"".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")}
    return drawn


def test_charts_hold_their_labels():
    drawn = charts_of(everything())
    assert set(drawn) == {"layers-gpu.svg", "roofline-gpu.svg", "memory-gpu.svg", "step-gpu.svg"}
    for texts in drawn.values():
        assert "Some GPU; commit abc1234, PyTorch 2.11.0, 2026-11-24 20:00 UTC" in texts
    layers = "quaternion network, forward+backward, bf16, batch 20, CUDA graph"
    assert {layers, "conv 2", "conv 6-7", "ours auto", "concatenated", "SpeechBrain", "1.60", "1.80", "REFUSED"} <= (
        drawn["layers-gpu.svg"]
    )
    assert {"paper, " + layers, "layers 1-2", "ours", "materialised", "3 MB", "out of memory"} <= drawn[
        "memory-gpu.svg"
    ]
    titles = {f"{network}, batch 20, bf16, CUDA graph" for network in ("quaternion", "real")}
    bars = {"AT at layer 2, ours", "AT at layer 2, research style", "70 ms", "failed", *report.PARTS}
    assert titles | bars <= drawn["step-gpu.svg"]
    roof = {"ours, batch 20", "best baseline, batch 20", "conv 2", "measured roof", "FLOP per byte of the definition"}
    assert roof <= drawn["roofline-gpu.svg"]


def drawn_by(function, m):
    """A chart before it is text."""
    from matplotlib import style

    with style.context(["default", report.STYLE]):
        return function(m)


def test_bars_are_as_long_as_they_should_be():
    axis = drawn_by(report._speeds, everything()).axes[0]
    heights = [[bar.get_height() + bar.get_y() for bar in group] for group in axis.containers]
    # ours, concatenated, and SpeechBrain, which was refused at conv 2
    assert heights == [pytest.approx([80 / 50, 90 / 50]), pytest.approx([1.0]), pytest.approx([1.0, 1.0])]


def test_a_baseline_of_another_variant_is_drawn_as_the_table_says():
    compiled = {"variant": "against torch.compile"}
    rows = [row(50.0), row(100.0, provider="b"), row(60.0, **compiled), row(90.0, provider="torch.compile", **compiled)]
    axis = drawn_by(report._speeds, measured(*rows)).axes[0]
    ours, other, best = ([bar.get_height() + bar.get_y() for bar in group] for group in axis.containers)
    assert [*ours, *other, *best] == pytest.approx([1.5, 0.75, 1.0])


def test_points_of_the_roofline():
    lines = {
        line.get_label(): line.get_xydata().tolist() for line in drawn_by(report._roofline, everything()).axes[0].lines
    }
    # 1e9 FLOP and 1e7 bytes in 50, 80 and 90 us; the roof bends at 8e14 / 4e12 FLOP per byte.
    assert lines["ours, batch 20"] == [pytest.approx([100.0, 20.0])] * 2
    assert lines["best baseline, batch 20"] == [pytest.approx([100.0, 1e9 / us * 1e-6]) for us in (80, 90)]
    assert lines["measured roof"] == [pytest.approx([100.0, 400.0]), pytest.approx([200.0, 800.0])]


def test_stacks_add_up_to_the_step():
    rows = [row(us, **{**STEP, "layer": "AT at layer 2", "work": work}) for work, us in
            zip(report.WORKS, (5e3, 2e4, 6e4, 7e4), strict=True)]  # fmt: skip
    bars = [bar for group in drawn_by(report._steps, measured(*rows)).axes[0].containers for bar in group]
    assert [(bar.get_y(), bar.get_height()) for bar in bars[:4]] == [
        pytest.approx(ends) for ends in [(0, 5), (5, 15), (20, 40), (60, 10)]
    ]


def test_a_chart_needs_its_rows():
    assert charts_of() == charts_of(measured()) == {}
    assert set(charts_of(measured(row(), row(provider="b")))) == {"layers-gpu.svg", "roofline-gpu.svg"}
    assert set(charts_of(measured(row()))) == {"roofline-gpu.svg"}
    assert set(charts_of(measured(row(**LOSS)))) == set()  # its memory is not known
    assert set(charts_of(measured(row(**LOSS, peak_bytes=5)))) == {"memory-gpu.svg"}
    assert set(charts_of(measured(*steps()))) == set()  # no parts
    unroofed = everything()._replace(results=Results(everything().results.rows, GPU))
    assert "measured roof" not in charts_of(unroofed)["roofline-gpu.svg"]


def test_charts_are_the_same_bytes_again(monkeypatch):
    first = report.charts([everything()])
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 20, "svg.hashsalt": None}):
        assert report.charts([everything()]) == first
    assert all("<dc:date>" not in svg and "fill: #ffffff" in svg for svg in first.values())


# Files


def committed(folder: Path, name: str, m: report.Measured) -> Path:
    target = folder / "bench/results" / name
    target.mkdir(parents=True)
    write(target / "results.csv", m.results.rows, m.results.provenance)
    return target


def put_fresh(target: Path, lines: list[dict[str, str]]) -> None:
    with (target / "fresh.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def test_folders_are_loaded_gpus_first(tmp_path):
    for name, provenance in (("b", GPU), ("a", CPU), ("c", GPU)):
        target = committed(tmp_path, name, measured(row(), **provenance))
    put_fresh(target, [fresh_line(row(), host_bytes="12", gpu_bytes="")])
    (tmp_path / "bench/results/other.csv").write_text("x\n")
    (tmp_path / "bench/results/empty").mkdir()
    loaded = report.load(tmp_path / "bench/results")
    assert [m.path.parent.name for m in loaded] == ["b", "c", "a"]
    assert loaded[1].results == Results([row()], GPU)
    assert [line["host_bytes"] for line in loaded[1].fresh.values()] == ["12"]
    assert loaded[0].fresh == {}


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="no such folder of results"):
        report.load(tmp_path / "nothing")
    target = committed(tmp_path, "gpu", measured(row()))
    put_fresh(target, [{name: text for name, text in fresh_line(row()).items() if name != "host_bytes"}])
    with pytest.raises(ValueError, match=r"fresh.csv:2: not a fresh.csv: it lacks host_bytes"):
        report.load(tmp_path / "bench/results")
    put_fresh(target, [fresh_line(row()), fresh_line(row(), gpu_bytes="1 MB")])
    with pytest.raises(ValueError, match=r"fresh.csv:3: gpu_bytes is '1 MB'; it is a whole number"):
        report.load(tmp_path / "bench/results")
    (target / "fresh.csv").unlink()
    (target / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"not a results\.csv"):
        report.load(tmp_path / "bench/results")


def marked(*names: str) -> str:
    return "".join(f"before {name}\n<!-- bench: {name} -->\nold\n<!-- /bench -->\nafter\n" for name in names)


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_readme_is_filled_and_nothing_else_touched(tmp_path, monkeypatch):
    committed(tmp_path, "gpu", everything())
    readme = tmp_path / "README.md"
    readme.write_text(marked(*report.SECTIONS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    report.write_report(Path("bench/results"), Path("docs"), Path("README.md"))
    text = readme.read_text(encoding="utf-8")
    assert "old" not in text
    outside = re.sub(r"(-->\n).*?(<!-- /bench -->)", r"\1old\n\2", text, flags=re.DOTALL)
    assert outside == marked(*report.SECTIONS)
    sections = dict(re.findall(r"<!-- bench: (\S+) -->(.*?)<!-- /bench -->", text, re.DOTALL))
    images = {name: re.findall(r"!\[.*\]\((.*)\)", section) for name, section in sections.items()}
    assert images == {
        "layers": ["docs/bench/layers-gpu.svg", "docs/bench/roofline-gpu.svg"],
        "anti-transfer": ["docs/bench/memory-gpu.svg"],
        "step": ["docs/bench/step-gpu.svg"],
        "paper": [],
    }
    assert all((tmp_path / image).is_file() for found in images.values() for image in found)
    assert "[bench/results/gpu/results.csv](bench/results/gpu/results.csv)" in sections["layers"]
    assert line_of(sections["layers"], layer="conv 2")["speed-up"] == "1.60"
    assert "layer" in sections["step"]
    assert "WASPAA 2023" in sections["paper"]
    assert len(state(tmp_path)) == 6


def test_a_second_run_changes_nothing_wherever_it_starts(tmp_path, monkeypatch):
    committed(tmp_path, "gpu", everything())
    (tmp_path / "README.md").write_text(marked(*report.SECTIONS), encoding="utf-8")
    report.write_report(tmp_path / "bench/results", tmp_path / "docs", tmp_path / "README.md")
    once = state(tmp_path)
    monkeypatch.chdir(tmp_path / "bench")
    report.write_report(Path("results"), Path("../docs"), Path("../README.md"))
    assert state(tmp_path) == once


def test_line_ends_and_bytes_outside_stay():
    text = "\ufeffa \r\n\tü <!-- bench: x --> old <!-- /bench --> tail  \r\n"
    assert (
        report.filled(text, {"x": "1\n2"}, "f")
        == "\ufeffa \r\n\tü <!-- bench: x -->\r\n1\r\n2\r\n<!-- /bench --> tail  \r\n"
    )
    assert report.filled("no marker\n", {"x": "1"}, "f") == "no marker\n"


def test_windows_line_ends_stay_in_the_file(tmp_path):
    committed(tmp_path, "gpu", measured(row()))
    readme = tmp_path / "README.md"
    readme.write_bytes(marked("paper").replace("\n", "\r\n").encode())
    report.write_report(tmp_path / "bench/results", tmp_path / "docs", readme)
    assert re.search(rb"[^\r]\n", readme.read_bytes()) is None
    assert b"not measured" in readme.read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a\n<!-- bench: speed -->\n<!-- /bench -->\n",
            r":2: no section 'speed'; a marker names one of layers, anti-tra",
        ),
        ("<!-- bench: -->\n<!-- /bench -->\n", r":1: no section ''"),
        ("a\nb\n<!-- bench: step -->\n", r":3: <!-- bench: step --> needs a <!-- /bench --> before the next marker"),
        ("<!-- bench: step -->\n<!-- bench: paper -->\n<!-- /bench -->\n", r":1: <!-- bench: step --> needs a"),
        ("<!-- bench: step -->\n<!-- /bench -->\n<!-- /bench -->\n", r":3: <!-- /bench --> closes no"),
    ],
)
def test_wrong_markers_change_no_file(tmp_path, text, message):
    committed(tmp_path, "gpu", everything())
    readme = tmp_path / "README.md"
    readme.write_text(text)
    before = state(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(readme)) + message) as caught:
        report.write_report(tmp_path / "bench/results", tmp_path / "docs", readme)
    assert "\n" not in str(caught.value)
    assert state(tmp_path) == before


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    committed(tmp_path, "gpu", everything())
    readme = tmp_path / "README.md"
    readme.write_text(marked("layers"))
    before = state(tmp_path)

    def full(self, data):
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(tmp_path / "bench/results", tmp_path / "docs", readme)
    monkeypatch.undo()
    assert state(tmp_path) == before
