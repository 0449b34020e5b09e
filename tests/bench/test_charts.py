"""Charts against numbers worked out by hand."""

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from bench import charts, summary
from bench.results import Results
from tests.bench.measurements import GPU, LOSS, STEP, everything, measured, row, steps


def charts_of(*results: Any) -> dict[str, set[str]]:
    """The texts of each chart, by its file; each must be SVG."""
    drawn = {}
    for (_, file), svg in charts.charts(results).items():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        drawn[file] = {"".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")}
    return drawn


def test_charts_hold_their_labels() -> None:
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
    bars = {"AT at layer 2, ours", "AT at layer 2, research style", "70 ms", "failed", *summary.PARTS}
    assert titles | bars <= drawn["step-gpu.svg"]
    roof = {"ours, batch 20", "best baseline, batch 20", "conv 2", "measured roof", "FLOP per byte of the definition"}
    assert roof <= drawn["roofline-gpu.svg"]


def drawn_by(function: Any, m: Any) -> Any:
    """A chart before it is text."""
    from matplotlib import style

    with style.context(["default", charts.STYLE]):
        return function(m)


def test_bars_are_as_long_as_they_should_be() -> None:
    axis = drawn_by(charts.speeds, everything()).axes[0]
    heights = [[bar.get_height() + bar.get_y() for bar in group] for group in axis.containers]
    # ours, concatenated, and SpeechBrain, which was refused at conv 2
    assert heights == [pytest.approx([80 / 50, 90 / 50]), pytest.approx([1.0]), pytest.approx([1.0, 1.0])]


def test_a_baseline_of_another_variant_is_drawn_as_the_table_says() -> None:
    compiled = {"variant": "against torch.compile"}
    rows = [row(50.0), row(100.0, provider="b"), row(60.0, **compiled), row(90.0, provider="torch.compile", **compiled)]
    axis = drawn_by(charts.speeds, measured(*rows)).axes[0]
    ours, other, best = ([bar.get_height() + bar.get_y() for bar in group] for group in axis.containers)
    assert [*ours, *other, *best] == pytest.approx([1.5, 0.75, 1.0])


def test_points_of_the_roofline() -> None:
    lines = {
        line.get_label(): line.get_xydata().tolist() for line in drawn_by(charts.roofline, everything()).axes[0].lines
    }
    # 1e9 FLOP and 1e7 bytes in 50, 80 and 90 us; the roof bends at 8e14 / 4e12 FLOP per byte.
    assert lines["ours, batch 20"] == [pytest.approx([100.0, 20.0])] * 2
    assert lines["best baseline, batch 20"] == [pytest.approx([100.0, 1e9 / us * 1e-6]) for us in (80, 90)]
    assert lines["measured roof"] == [pytest.approx([100.0, 400.0]), pytest.approx([200.0, 800.0])]


def test_stacks_add_up_to_the_step() -> None:
    rows = [row(us, **{**STEP, "layer": "AT at layer 2", "work": work}) for work, us in
            zip(summary.WORKS, (5e3, 2e4, 6e4, 7e4), strict=True)]  # fmt: skip
    bars = [bar for group in drawn_by(charts.steps, measured(*rows)).axes[0].containers for bar in group]
    assert [(bar.get_y(), bar.get_height()) for bar in bars[:4]] == [
        pytest.approx(ends) for ends in [(0, 5), (5, 15), (20, 40), (60, 10)]
    ]


def test_a_chart_needs_its_rows() -> None:
    assert charts_of() == charts_of(measured()) == {}
    assert set(charts_of(measured(row(), row(provider="b")))) == {"layers-gpu.svg", "roofline-gpu.svg"}
    assert set(charts_of(measured(row()))) == {"roofline-gpu.svg"}
    assert set(charts_of(measured(row(**LOSS)))) == set()  # its memory is not known
    assert set(charts_of(measured(row(**LOSS, peak_bytes=5)))) == {"memory-gpu.svg"}
    assert set(charts_of(measured(*steps()))) == set()  # no parts
    unroofed = everything()._replace(results=Results(everything().results.rows, GPU))
    assert "measured roof" not in charts_of(unroofed)["roofline-gpu.svg"]


def test_charts_are_the_same_bytes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = charts.charts([everything()])
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 20, "svg.hashsalt": None}):
        assert charts.charts([everything()]) == first
    assert all("<dc:date>" not in svg and "fill: #ffffff" in svg for svg in first.values())
