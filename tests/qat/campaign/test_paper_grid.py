"""The paper's grid: what is planned, what it is estimated to cost, and that it survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import qat
from qat import cli
from qat.campaign.cost import estimate, flop_of_epoch
from qat.campaign.grid import plan_grid
from qat.campaign.options import Assumed, Selection
from qat.config.preset import VALUES
from qat.files import write_json
from tests.qat.campaign.running import fork_instead_of_jobs

NETWORKS, SPLITS, METHODS = VALUES["network"], VALUES["split"], VALUES["at"]


def some(values: Sequence[Any], least: int = 1) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=least, unique=True)


def test_the_whole_grid_has_642_trainings(tmp_path: Path) -> None:
    grid = plan_grid(tmp_path, "paper")
    assert len(grid.trainings) == len(grid.table) == 642
    assert grid.table["run"].is_unique
    stages = grid.table.fillna("").groupby(["stage", "network"]).size().to_dict()
    assert stages == {
        ("rhemo-1", ""): 1,
        ("rhemo-2", ""): 1,
        **{(stage, network): 1 for stage in ("word", "speaker") for network in NETWORKS},
        **{("emotion", network): 318 for network in NETWORKS},
    }
    cells = grid.table[grid.table["stage"] == "emotion"].groupby(["network", "corpus", "split"]).size()
    assert len(cells) == 12
    assert set(cells) == {53}
    assert len(plan_grid(tmp_path, "paper", seeds=[1, 2, 3]).trainings) == 6 + 3 * 636


def test_with_the_released_codes_random_twin_speakers_and_words_are_one(tmp_path: Path) -> None:
    grid = plan_grid(tmp_path, "released-code")
    assert len(grid.trainings) == 2 + 12 * (1 + 13 * 2)
    table = grid.table.set_index("name")["run"]
    assert len(table) == 2 + 636
    name = "emotion real tess actor {} layer 7"
    assert table[name.format("single_S")] == table[name.format("single_W")] != table[name.format("dual_SW")]
    assert table[name.format("dual_SW")] == table[name.format("dual_WS")]


@settings(max_examples=25)
@given(
    corpora=some(["iemocap", "ravdess", "tess"]),
    networks=some(NETWORKS),
    splits=some(SPLITS),
    at=some(METHODS),
    layers=some(range(1, 14)),
    seeds=some(range(4)),
)
def test_a_selection_has_what_it_needs_and_no_more(
    corpora: list[str], networks: list[str], splits: list[str], at: list[str], layers: list[int], seeds: list[int]
) -> None:
    grid = plan_grid(Path("out"), "paper", Selection(corpora, networks, splits, at, layers), seeds)
    kinds = set(at) | {"single_S" for one in at if one == "dual_SW"} | {"single_W" for one in at if one == "dual_WS"}
    tasks = {one[-1] for one in kinds if one != "none"}
    cells = len(corpora) * len(networks) * len(splits) * len(seeds)
    emotion = cells * (("none" in kinds) + len(layers) * len(kinds - {"none"}))
    assert len(grid.trainings) == emotion + len(tasks) * len(networks) + 2 * ("quaternion" in networks)
    done: set[Path] = set()
    for path, one in grid.trainings.items():
        assert set(grid.needs(one)) <= done
        done.add(path)


def test_every_training_builds_on_the_right_ones(tmp_path: Path) -> None:
    grid = plan_grid(tmp_path, "paper", Selection(["tess"], layers=[2, 13]), [1, 2])
    run = {tuple(row[1:8]): row[0] for row in grid.table.fillna("").itertuples(index=False)}
    for (stage, network, corpus, split, at, layer, seed), address in run.items():
        one: Any = grid.trainings[Path("runs") / address]
        used = {need.name for need in grid.needs(one)}
        expected = set()
        if network == "quaternion":
            expected.add(run["rhemo-2", "", "", "", "", "", ""])
        if stage == "rhemo-2":
            expected.add(run["rhemo-1", "", "", "", "", "", ""])
        if stage == "emotion" and at != "none":
            assert one.anti_transfer.layers == [layer]
            task = {"S": "speaker", "W": "word"}[at[-1]]
            expected.add(run[task, network, "", "", "", "", ""])
            if at.startswith("dual"):
                expected.add(run["emotion", network, corpus, split, f"single_{at[-2]}", layer, seed])
        assert used == expected
        if stage == "emotion":
            assert one.training.seed == seed
            assert one.network.domain == network
            assert one.corpus.name == corpus
            assert one.split.rule == {"random": "random", "actor": "paper-actor"}[split]
            assert (one.anti_transfer.twin is None) == (at == "none")
        elif stage in ("word", "speaker"):
            assert (one.task, one.network.domain) == (stage, network)
            assert one.corpus.name == {"word": "librispeech", "speaker": "iemocap"}[stage]


def test_own_settings_lie_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("- when: {stage: emotion, at: single_S, layer: 2}\n  settings: {training: {lr: 0.5}}\n")
    chosen = Selection(["tess"], ["real"], ["random"], ["none", "single_S"], [2, 3])
    plain, own = plan_grid(tmp_path, "paper", chosen), plan_grid(tmp_path, "paper", chosen, settings=file)
    a, b = (grid.table.set_index("name")["run"] for grid in (plain, own))
    assert [name for name in a.index if a[name] != b[name]] == ["emotion real tess random single_S layer 2"]
    assert own.trainings[Path("runs") / b.iloc[-2]].training.lr == 0.5


@pytest.mark.parametrize("transfer", ["{random_twin: true}", "{twin: twin, beta: 2.0}"])
def test_a_baseline_has_no_anti_transfer_whatever_emotion_trainings_have(transfer: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"- when: {{stage: emotion}}\n  settings: {{anti_transfer: {transfer}}}\n")
    chosen = Selection(["tess"], ["real"], ["random"], ["none", "single_W"], [2])
    plain, own = plan_grid(tmp_path, "paper", chosen), plan_grid(tmp_path, "paper", chosen, settings=file)
    a, b = (grid.table.set_index("name")["run"] for grid in (plain, own))
    assert a["emotion real tess random none"] == b["emotion real tess random none"]
    single = "emotion real tess random single_W layer 2"
    assert len({a[single], b[single], b["emotion real tess random none"]}) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"corpora": ["mars"]}, "corpora: 'mars' must be one of demo, hedgewars, iemocap, ravdess, tess"),
        ({"layers": [0]}, "layers: 0 must be one of 1, 2"),
        ({"at": ["single_X"]}, "at: 'single_X' must be one of none, single_S"),
        ({"splits": []}, r"splits: \[\] must be one or more"),
        ({"layers": [2, 2]}, r"layers: \[2, 2\] must be one or more, each once"),
    ],
)
def test_a_wrong_selection_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**given)


def test_missing_corpora_are_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tess").mkdir()
    command = ["grid", "--out", "out", "--corpora", "[tess]", "--networks", "[real]", "--at", "[none, single_W]"]
    assert cli.main([*command, "--folders", "{tess: tess}", "--cluster", "local"]) == 2
    told = capsys.readouterr().err
    assert "librispeech: no folder corpora/librispeech; name it with --folders '{librispeech: DIR}'" in told
    assert "tess:" not in told.replace("grid:", "")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing_and_says_what_is_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["grid", "--out", "out", "--dry-run", "--json", "--assumed.epochs", "100"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["trainings"], told["finished"], len(told["runs"])) == (642, 0, 642)
    assert sum(stage["trainings"] for stage in told["stages"]) == 642
    assert {stage["basis"] for stage in told["stages"]} == {"assumed"}
    assert told["hours"] == pytest.approx(sum(stage["hours"] for stage in told["stages"]), abs=0.06)
    assert "not measured" in told["note"]
    assert not list(tmp_path.iterdir())


def test_hours_are_arithmetic_until_something_is_measured(tmp_path: Path) -> None:
    """The real network without pool: 19.97 G multiplications in convolutions, 151.0 M in linear maps, a sample."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("- settings: {network: {adaptive_pool: false}, anti_transfer: {cache: false}}\n")
    chosen = Selection(["ravdess"], ["real"], ["random"], ["none", "single_S"], [2])
    grid = plan_grid(tmp_path / "out", "paper", chosen, settings=mine)
    table = grid.table.set_index("name")["run"]
    runs = {name: Path("runs") / table[name] for name in table.index if name.startswith("emotion")}
    forward = 2 * (19.969e9 + 0.151e9)
    twin = 2 * (37.7e6 + 2415.9e6)
    epoch = {"none": 1008 * 3 * forward + 288 * forward}
    epoch["single_S layer 2"] = 1008 * (3 * forward + twin) + 288 * (forward + twin)
    for name, flop in epoch.items():
        one = grid.trainings[runs[f"emotion real ravdess random {name}"]]
        assert flop_of_epoch(one) == pytest.approx(flop, rel=1e-3)
    told = estimate(grid, Assumed(epochs=50, tflops=2.0)).set_index("stage")
    assert told.loc["emotion", "hours"] == pytest.approx(50 * sum(epoch.values()) / 2e12 / 3600, rel=1e-3)

    from qat.config import to_plain

    done = runs["emotion real ravdess random none"]
    result = {"experiment": to_plain(grid.trainings[done]), "epochs": 30, "seconds": 900.0, "device": "a GPU"}
    write_json(grid.folder / done / "result.json", result)
    told = estimate(grid, Assumed(epochs=50, tflops=2.0)).set_index("stage")
    rate = epoch["none"] / 30  # in a second: 30 epochs took 900 of them
    assert told.loc["emotion", "finished"] == 1
    assert told.loc["emotion", "epochs"] == 30
    assert told.loc["emotion", "hours"] == pytest.approx(30 * epoch["single_S layer 2"] / rate / 3600, rel=1e-3)
    assert told.loc["emotion", "basis"] == "measured in 1 of them on a GPU"
    assert told.loc["speaker", "basis"] == "assumed"


def command(small: Path, out: Path, *more: str) -> list[str]:
    where = ["--folders", f"{{demo: {small / 'demo'}}}", "--settings", str(small / "tiny.yaml")]
    return ["grid", "--preset", "demo", "--corpora", "[demo]", "--out", str(out), "--cluster", "local", *where, *more]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("network", ["real", pytest.param("quaternion", marks=pytest.mark.slow)])
def test_a_grid_is_trained_in_order_and_never_twice(
    network: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_instead_of_jobs(monkeypatch)
    out = tmp_path / "out"
    asked = ["--networks", f"[{network}]", "--at", "[none, dual_SW]", "--layers", "[13]", "--splits", "[actor]"]
    assert cli.main([*command(small, out, *asked), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = ["rhemo-1", "rhemo-2"] if network == "quaternion" else []
    names += ["emotion none", "speaker", "emotion single_S", "word", "emotion dual_SW"]
    assert (told["trainings"], told["finished"], told["problems"]) == (len(names), len(names), [])
    plan = pd.read_csv(out / "plan.csv", keep_default_na=False)
    assert [f"{row.stage} {row.at}".strip() for row in plan.itertuples()] == names
    run = dict(zip(plan["name"], plan["run"], strict=True))
    results = {name: json.loads((out / "runs" / run[name] / "result.json").read_text()) for name in run}
    single, dual = (results[f"emotion {network} demo actor {at} layer 13"] for at in ("single_S", "dual_SW"))
    first_half = run[f"emotion {network} demo actor single_S layer 13"]
    assert Path(dual["experiment"]["training"]["initial"]).name == first_half
    assert Path(dual["experiment"]["anti_transfer"]["twin"]).name == run[f"word {network}"]
    assert Path(single["experiment"]["anti_transfer"]["twin"]).name == run[f"speaker {network}"]
    asked_again = yaml.safe_load((out / "campaign.yaml").read_text())
    assert asked_again["preset"] == "demo"
    assert asked_again["selection"]["layers"] == [13]
    written = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert cli.main(command(small, out, *asked)) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == written
    assert cli.main([*command(small, out, *asked), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert told["finished"] == len(names)
    assert told["hours"] == 0


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_grid_killed_at_random_points_gives_what_an_undisturbed_one_does(
    small: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    asked = ["--networks", "[real]", "--at", "[none, dual_SW]", "--layers", "[13]", "--splits", "[random]"]
    environment = os.environ | {"PYTHONPATH": str(Path(qat.__file__).parents[1])}

    def start(out: Path) -> subprocess.Popen[bytes]:
        full = [sys.executable, "-m", "qat", *command(small, out, *asked, "--at-once", "2")]
        return subprocess.Popen(full, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    calm, killed = tmp_path / "calm", tmp_path / "killed"
    started = time.monotonic()
    with start(calm) as process:
        assert process.wait() == 0
    whole = time.monotonic() - started
    finished: dict[Path, int] = {}
    for _ in range(3):
        with start(killed) as process:
            try:
                process.wait(rng.uniform(0.1, 0.8) * whole)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
        now = {path: path.stat().st_mtime_ns for path in killed.rglob("result.json")}
        assert {path: now[path] for path in finished} == finished
        finished = now
    with start(killed) as process:
        assert process.wait() == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    runs = sorted(path.name for path in (calm / "runs").iterdir())
    assert runs == sorted(path.name for path in (killed / "runs").iterdir())
    assert len(runs) == 5
    for run in runs:
        a, b = (load_file(folder / "runs" / run / "model.safetensors") for folder in (calm, killed))
        assert all(torch.equal(a[name], b[name]) for name in a)
        a, b = (json.loads((folder / "runs" / run / "result.json").read_text()) for folder in (calm, killed))
        assert a["parts"] == b["parts"]
        assert (a["epochs"], a["kept_epoch"]) == (b["epochs"], b["kept_epoch"])
    assert not list(killed.rglob("error.txt"))
