"""Runs as they are read, and what is worked out from their rows."""

import re
from pathlib import Path
from typing import Any

import pytest

from bench import summary, tables
from bench.network import NO_AT
from bench.results import Results
from tests.bench.measurements import CPU, GPU, STEP, committed, fresh_of, measured, row, shared


def test_folders_are_loaded_gpus_first(tmp_path: Path) -> None:
    first = fresh_of(row(), first_call_s=2.5, host_bytes=12)
    for name, provenance, fresh in (("b", GPU, ()), ("a", CPU, ()), ("c", GPU, [first])):
        committed(tmp_path, name, measured(row(), fresh=fresh, **provenance))
    (tmp_path / "bench/results/other.csv").write_text("x\n")
    (tmp_path / "bench/results/empty").mkdir()
    loaded = summary.load(tmp_path / "bench/results")
    assert [m.path.parent.name for m in loaded] == ["b", "c", "a"]
    assert loaded[1].results == Results([row()], GPU)
    assert loaded[1].fresh.rows == [first]
    assert loaded[0].fresh.rows == []


def test_trainings_side_by_side_have_an_origin_of_their_own(tmp_path: Path) -> None:
    lines = [shared(1, 1.0), shared(2, None, status="failed"), shared(4, 3.0, mode="MPS", peak_bytes=7)]
    loaded = summary.load_folder(committed(tmp_path, "gpu", measured(row(), shared=lines)))
    assert loaded.shared.rows == lines
    assert loaded.shared.provenance == {**GPU, "commit": "def5678"}
    assert loaded.results.provenance == GPU
    assert summary.load_folder(committed(tmp_path, "b", measured(row()))).shared.rows == []


def test_the_order_of_columns_is_of_no_account(tmp_path: Path) -> None:
    first = fresh_of(row(), first_call_s=2.5, cold_call_s=40.0, peak_bytes=1, gpu_bytes=2, host_bytes=3)
    folder = committed(tmp_path, "gpu", measured(row(), fresh=[first]))
    head, line = (text.split(",") for text in edited(folder / "fresh.csv").splitlines())
    (folder / "fresh.csv").write_text(f"{','.join(reversed(head))}\n{','.join(reversed(line))}\n")
    assert summary.load_folder(folder).fresh.rows == [first]


def edited(path: Path, old: str = "", new: str = "") -> str:
    """The text of a file, after something in it is replaced."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new) if old else text)
    return path.read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",host_bytes", ",other", " not a fresh.csv: it lacks the columns host_bytes"),
        (",1000,", ",1 kB,", "3: gpu_bytes is '1 kB'; it must be a whole number or empty"),
        (",2.5,", ",soon,", "3: first_call_s is 'soon'; it must be a number or empty"),
        (",256,", ",,", "3: batch is ''; it must be a whole number"),
    ],
)
def test_a_wrong_fresh_csv_is_named_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    lines = [fresh_of(row()), fresh_of(row(batch=256), first_call_s=2.5, gpu_bytes=1000)]
    folder = committed(tmp_path, "gpu", measured(row(), fresh=lines))
    edited(folder / "fresh.csv", old, new)
    with pytest.raises(ValueError, match=re.escape(f"{folder / 'fresh.csv'}:{message}") + "$"):
        summary.load(folder.parent)


def test_a_wrong_sharing_csv_is_named_with_its_line(tmp_path: Path) -> None:
    folder = committed(tmp_path, "gpu", measured(row(), shared=[shared(1, 1.0), shared(2, 1.5)]))
    edited(folder / "sharing.csv", ",1.5,", ",fast,")
    with pytest.raises(
        ValueError, match=r"sharing\.csv:3: trainings_relative is 'fast'; it must be a number or empty$"
    ):
        summary.load(folder.parent)
    edited(folder / "sharing.csv", "threads_each", "other")
    with pytest.raises(ValueError, match=r"sharing\.csv: not a sharing\.csv: it lacks the columns threads_each$"):
        summary.load(folder.parent)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder of results"):
        summary.load(tmp_path / "nothing")
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}: has no results.csv; [^\n]*$"):
            summary.load_folder(folder)
    folder = committed(tmp_path, "gpu", measured(row()))
    (folder / "results.csv").write_text("a,b\n1,2\n")
    for load in (lambda: summary.load(folder.parent), lambda: summary.load_folder(folder)):
        with pytest.raises(ValueError, match=r"results\.csv: not a results\.csv"):
            load()


def test_rows_of_a_cpu_belong_where_their_layer_says() -> None:
    rows = {
        "layers": row(suite="cpu"),
        "anti-transfer": row(suite="cpu", layer="layers 8-10", variant="paper", provider="ours"),
        "step": row(suite="cpu", layer="AT at layer 2", work="step"),
        "epoch": row(suite="cpu", layer=NO_AT, work="epoch", variant="width 1/8"),
        "inference": row(suite="cpu", layer="whole network", work="forward"),
    }
    m = measured(*rows.values(), **CPU)
    for kind, expected in rows.items():
        assert m.rows(kind) == [expected]
    assert "**Some CPU, 2 threads**" in tables.layers([m])
    assert summary.kind_of(row(suite="epoch", layer=NO_AT, work="epoch")) == "epoch"


def test_parts_of_a_step() -> None:
    def of(times: Any, layer: str = "AT at layer 2", **fields: Any) -> Any:
        names = {**STEP, "layer": layer, **fields}
        return summary.parts(row(us, **{**names, "work": work}) for work, us in times)

    works = list(zip(summary.WORKS, (5.0, 20.0, 60.0, 70.0), strict=True))
    assert of(works) == [5.0, 15.0, 40.0, 10.0]
    assert of(works[1:]) is None
    assert of(works[1:], layer=NO_AT) == of(works[1:], variant="cached targets") == [0.0, 20.0, 40.0, 10.0]
    assert of(works[:3]) is None
    assert of([*works[:2], works[3]]) is None
    assert of(works, status="failed") is None
    # By noise forward + backward took longer than the whole step.
    assert of([*works[:2], (summary.WORKS[2], 71.0), works[3]]) == [5.0, 15.0, 50.0, 0.0]
