"""Results against results: what counts as a change, and where committed results are found."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.compare import LINES, compare, load
from bench.results import Results, Row, write

PROVENANCE = {"device": "A GPU", "threads": "8", "commit": "abc"}


def row(**fields: Any) -> Row:
    plain = {
        "suite": "conv", "network": "quaternion", "layer": "conv 2", "variant": "", "batch": 20, "precision": "bf16",
        "work": "forward", "mode": "graph", "provider": "ours auto", "shape": "", "status": "ok", "median_us": 100.0,
        "p20_us": 100.0, "p80_us": 100.0, "peak_bytes": 10**7, "flops": 1, "bytes": 1,
    }  # fmt: skip
    return Row(**{**plain, **fields})


def results(*rows: Any, **provenance: Any) -> Results[Row]:
    return Results(list(rows), {**PROVENANCE, **provenance})


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [change.verdict for change in compare(results(row(**before)), results(row(**after))).changes]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, []),
        ({}, {"median_us": 105.0}, []),  # 5 % is not more than 5 %
        ({}, {"median_us": 105.1}, ["slower"]),
        ({}, {"median_us": 95.0}, []),
        ({}, {"median_us": 94.9}, ["faster"]),
        ({"p20_us": 95.0, "p80_us": 110.0}, {"median_us": 115.0}, []),  # within the spread before
        ({}, {"median_us": 115.0, "p20_us": 110.0, "p80_us": 125.0}, []),  # and within that after
        ({"p20_us": 95.0, "p80_us": 110.0}, {"median_us": 115.1}, ["slower"]),
        ({"p20_us": 95.0, "p80_us": 110.0}, {"median_us": 84.9}, ["faster"]),
        ({}, {"median_us": None}, []),
        ({}, {"peak_bytes": 10_500_000}, []),
        ({}, {"peak_bytes": 10_500_001}, ["more memory"]),
        ({}, {"peak_bytes": 9_499_999}, ["less memory"]),
        ({"peak_bytes": 1000}, {"peak_bytes": 1000 + 65536}, []),  # 64 KiB are not more than 64 KiB
        ({"peak_bytes": 1000}, {"peak_bytes": 1001 + 65536}, ["more memory"]),
        ({"peak_bytes": 0}, {"peak_bytes": 10**6}, ["more memory"]),
        ({"peak_bytes": None}, {}, []),
        ({}, {"median_us": 200.0, "peak_bytes": 2 * 10**7}, ["more memory", "slower"]),
        ({}, {"status": "REFUSED", "median_us": None}, ["now REFUSED"]),
        ({}, {"status": "out of memory", "median_us": None}, ["now out of memory"]),
        ({}, {"status": "failed", "median_us": 500.0}, ["now failed"]),  # and nothing is said of a wrong result's time
        ({"status": "smoke"}, {"status": "REFUSED"}, ["now REFUSED"]),
        ({}, {"status": "smoke", "median_us": None}, []),
        ({"status": "failed"}, {}, ["now ok"]),
        ({"status": "failed"}, {"status": "REFUSED"}, []),
    ],
)
def test_verdicts(before: Any, after: Any, expected: Any) -> None:
    assert sorted(verdicts(before, after)) == expected


def test_what_regressed() -> None:
    regressing = ({"median_us": 200.0}, {"peak_bytes": 10**9}, {"status": "REFUSED"})
    for after in regressing:
        assert compare(results(row()), results(row(**after))).regressions
    for before in regressing:
        assert not compare(results(row(**before)), results(row())).regressions


def test_rows_are_matched_by_all_of_their_key() -> None:
    """A row that differs in anything that names it is another row."""
    names = {"suite": "linear", "network": "real", "layer": "conv 3", "variant": "x", "batch": 1, "precision": "fp16",
             "work": "dx", "mode": "eager", "provider": "ours"}  # fmt: skip
    for field, value in names.items():
        other = row(**{field: value, "median_us": 900.0})
        found = compare(results(row(), row(provider="a")), results(other, row(provider="a")))
        assert (found.matched, found.changes) == (1, []), field
    assert compare(results(row(shape="1")), results(row(shape="2"))).matched == 1


def test_rows_of_one_side_are_counted_by_suite() -> None:
    before = results(row(), row(suite="linear"), row(suite="linear", layer="x"), row(suite="atl"))
    found = compare(before, results(row(), row(suite="step")))
    assert (found.only_before, found.only_after) == ({"linear": 2, "atl": 1}, {"step": 1})
    assert not found.regressions
    summary = str(found).splitlines()[-1]
    assert summary == "1 rows compared: nothing changed; only before: 1 of atl, 2 of linear; only after: 1 of step"


def test_text_is_worst_first() -> None:
    names = ("faster", "a bit slower", "same", "wrong", "much slower", "large")
    before = results(*(row(layer=name) for name in names))
    after = results(
        row(layer="faster", median_us=50.0),
        row(layer="a bit slower", median_us=110.0),
        row(layer="same"),
        row(layer="wrong", status="REFUSED", median_us=None),
        row(layer="much slower", median_us=300.0),
        row(layer="large", peak_bytes=2 * 10**7),
    )
    lines = str(compare(before, after)).splitlines()
    order = [next(name for name in names if f", {name}," in line) for line in lines[:-1]]
    assert order == ["wrong", "much slower", "large", "a bit slower", "faster"]
    assert "100 µs -> 300 µs" in lines[1]
    assert "3.00x" in lines[1]
    assert "10 MB -> 20 MB" in lines[2]
    assert lines[-1] == "6 rows compared: 1 now REFUSED; 2 slower; 1 more memory; 1 faster"


def test_a_long_table_is_cut_and_says_so() -> None:
    rows = [row(layer=f"conv {n}") for n in range(LINES + 3)]
    slow = [replace(one, median_us=200.0) for one in rows]
    lines = str(compare(results(*rows), results(*slow))).splitlines()
    assert len(lines) == LINES + 2
    assert lines[-2:] == ["and 3 more", f"{LINES + 3} rows compared: {LINES + 3} slower"]


@pytest.mark.parametrize(("field", "other"), [("device", "B GPU"), ("threads", "2")])
def test_other_machines_are_not_compared(field: str, other: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: {PROVENANCE[field]} before, {other} after"):
        compare(results(row()), results(row(), **{field: other}))


def test_nothing_in_common_and_a_row_twice() -> None:
    with pytest.raises(ValueError, match="no row is in both"):
        compare(results(row()), results(row(layer="x")))
    with pytest.raises(ValueError, match="after: two rows with the same name: conv, quaternion, conv 2"):
        compare(results(row()), results(row(), row(median_us=5.0)))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two commits: results of one GPU; then others there, and those of a CPU. HEAD's files are gone from the tree."""

    def git(*arguments: Any) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def put(name: Any, median: Any) -> None:
        folder = tmp_path / "bench/results" / name
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "results.csv", [row(median_us=median)], PROVENANCE)
        git("add", ".")

    git("init", "-q")
    put("gpu", 1.0)
    (tmp_path / "bench/results/other.csv").write_text("x\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "one")
    put("gpu", 2.0)
    put("cpu", 3.0)
    git("commit", "-q", "-m", "second")
    git("tag", "two")
    git("rm", "-q", "-r", "bench/results")
    (tmp_path / "notes").write_text("x")
    git("add", ".")
    git("commit", "-q", "-m", "third")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def median(name: Any, **options: Any) -> Any:
    return load(name, **options).rows[0].median_us


def test_committed_results(repository: Any) -> None:
    assert median("one") == 1.0
    assert median("two:gpu") == 2.0
    assert median("two:cpu/") == 3.0
    assert median("HEAD~1:cpu") == 3.0
    assert load("one").provenance == PROVENANCE


def test_committed_results_from_a_folder_of_the_repository(repository: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "bench").mkdir(exist_ok=True)
    monkeypatch.chdir(repository / "bench")
    assert median("two:cpu", folder="results") == 3.0


def test_files_go_first(repository: Any) -> None:
    (repository / "one").mkdir()
    write(repository / "one/results.csv", [row(median_us=7.0)], PROVENANCE)
    assert median("one") == median("one/results.csv") == 7.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two", "two: name one of two:cpu, two:gpu$"),
        ("one:cpu", "one:cpu: name one of one:gpu$"),
        ("HEAD", "HEAD: has no results in bench/results"),
        ("nothing", "nothing: neither a folder, nor a results.csv, nor a revision"),
        ("--all", "--all: neither"),
        ("notes", "it lacks the columns"),
    ],
)
def test_names_that_are_no_results(repository: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ValueError, match="nor a revision of this repository"):
        load("HEAD")
