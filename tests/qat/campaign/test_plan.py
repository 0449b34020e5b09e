"""Campaigns of trainings that build on each other: addresses, needs, and what is trained when."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qat.campaign import plan as plan_module
from qat.campaign.jobs import train
from qat.campaign.plan import Campaign
from qat.config import (
    AntiTransferConfig,
    Experiment,
    NetworkConfig,
    RHEmoConfig,
    RHEmoExperiment,
    TrainingConfig,
    to_plain,
)
from qat.files import Busy, held, lock_of, read_json, write_json, write_text
from tests.qat.campaign.running import LOCAL, fork_instead_of_jobs

PlanIn = Callable[[Path], tuple[Campaign, dict[str, Path]]]


def chain(plan: Campaign, **changes: object) -> dict[str, Path]:
    """RH-Emo, twin, baseline, anti-transfer and its second half; ``changes`` are experiments to take instead."""
    runs: dict[str, Path] = {}
    runs["rhemo"] = plan.add(changes.get("rhemo", RHEmoExperiment()))
    network = NetworkConfig(rhemo=runs["rhemo"])
    runs["twin"] = plan.add(changes.get("twin", Experiment(task="speaker", network=network)))
    plain = Experiment(network=network)
    runs["baseline"] = plan.add(plain)
    at = replace(plain, anti_transfer=AntiTransferConfig(runs["twin"], [2]))
    runs["single"] = plan.add(at)
    runs["dual"] = plan.add(replace(at, training=TrainingConfig(initial=runs["single"])))
    return runs


def test_needs_are_what_a_training_builds_on(tmp_path: Path) -> None:
    plan = Campaign(tmp_path)
    runs = {name: path.relative_to(tmp_path) for name, path in chain(plan).items()}
    assert plan.needs(plan.trainings[runs["rhemo"]]) == []
    assert plan.needs(plan.trainings[runs["baseline"]]) == [runs["rhemo"]]
    assert plan.needs(plan.trainings[runs["single"]]) == [runs["rhemo"], runs["twin"]]
    assert plan.needs(plan.trainings[runs["dual"]]) == [runs["rhemo"], runs["twin"], runs["single"]]


def test_the_same_training_is_planned_once(tmp_path: Path) -> None:
    plan = Campaign(tmp_path)
    first, count = chain(plan), len(plan.trainings)
    assert chain(plan) == first
    assert len(plan.trainings) == count == 5


def test_an_address_changes_with_what_is_learnt_and_with_nothing_else(tmp_path: Path) -> None:
    plan, plain = Campaign(tmp_path), Experiment()
    different = [
        replace(plain, task="speaker"),
        replace(plain, normalisation="log"),
        replace(plain, corpus=replace(plain.corpus, folder=Path("elsewhere"))),
        replace(plain, corpus=replace(plain.corpus, where={"speaker": ["ann"]})),
        replace(plain, corpus=replace(plain.corpus, options={"words": 3})),
        replace(plain, split=replace(plain.split, seed=2)),
        replace(plain, network=replace(plain.network, width=0.5)),
        replace(plain, anti_transfer=AntiTransferConfig(layers=[3])),
        *(replace(plain, training=TrainingConfig(**{name: value})) for name, value in {
            "seed": 2, "lr": 2e-5, "epochs": 9, "keep": "last", "precision": "bf16", "deterministic": False
        }.items()),
    ]  # fmt: skip
    addresses = [plan.address(one) for one in (plain, *different)]
    assert len(set(addresses)) == len(addresses)
    same = [
        replace(plain, cache=Path("other")),
        *(replace(plain, training=TrainingConfig(**{name: value})) for name, value in {
            "device": "cpu", "capture": False, "data_mib": 1, "checkpoint_seconds": 0.0
        }.items()),
    ]  # fmt: skip
    assert {plan.address(one) for one in same} == {plan.address(plain)}
    assert plan.address(RHEmoExperiment()) != plan.address(plain)
    assert Campaign(tmp_path / "other").address(plain) == plan.address(plain)


def test_addresses_follow_what_is_built_on(tmp_path: Path) -> None:
    first = chain(Campaign(tmp_path))
    other = chain(Campaign(tmp_path), rhemo=RHEmoExperiment(rhemo=RHEmoConfig(width=0.5)))
    assert not set(first.values()) & set(other.values())
    plan = Campaign(tmp_path)
    twin = Experiment(task="word", network=NetworkConfig(rhemo=plan.add(RHEmoExperiment())))
    third = chain(plan, twin=twin)
    changed = {name for name in first if first[name] != third[name]}
    assert changed == {"twin", "single", "dual"}


def test_a_corpus_below_the_campaigns_folder_moves_with_it(tmp_path: Path) -> None:
    addresses = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        corpus = replace(Experiment().corpus, folder=folder / "corpora/demo")
        addresses.append(Campaign(folder).address(Experiment(corpus=corpus)))
    assert addresses[0] == addresses[1] != Campaign(tmp_path / "third").address(Experiment(corpus=corpus))


@pytest.mark.parametrize("name", ["demo.json", "grid.yaml", "emotion/at-voice/seed1/result.json"])
def test_a_folder_of_an_earlier_layout_is_refused(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "{}")
    plan = Campaign(tmp_path)
    with pytest.raises(ValueError, match=f"has {name}, of an older layout than plan.csv and runs/ADDRESS"):
        plan.finished()
    with pytest.raises(ValueError, match="an older layout"):
        train(plan, LOCAL)


def test_a_foreign_checkpoint_counts_by_its_content(tmp_path: Path) -> None:
    plan = Campaign(tmp_path / "plan")
    for name, text in (("a", "weights"), ("b", "weights"), ("c", "others")):
        write_text(tmp_path / name / "model.safetensors", text)
    a, b, c = (plan.address(Experiment(network=NetworkConfig(rhemo=tmp_path / name))) for name in "abc")
    assert a == b != c
    with pytest.raises(ValueError, match=r"network.rhemo: .*absent must be a checkpoint, or a run of the plan"):
        plan.address(Experiment(network=NetworkConfig(rhemo=tmp_path / "absent")))
    with pytest.raises(ValueError, match="or a run of the plan that was added before"):
        plan.address(Experiment(network=NetworkConfig(rhemo=plan.folder / "runs" / "0123456789abcdef")))


def test_a_foreign_checkpoint_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "own" / "model.safetensors", "weights")
    read: list[Path] = []
    monkeypatch.setattr(plan_module, "sha256_of", lambda file: read.append(file) or "0" * 64)
    plan = Campaign(tmp_path / "plan")
    plain = Experiment(network=NetworkConfig(rhemo=tmp_path / "own"))
    for seed in (1, 2, 3):
        plan.add(replace(plain, training=TrainingConfig(seed=seed)))
    assert read == [tmp_path / "own" / "model.safetensors"]


@pytest.fixture
def tiny(experiment: Experiment, tiny_training: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> PlanIn:
    """A plan of real trainings: a twin, and two emotion networks of which one builds on it."""
    fork_instead_of_jobs(monkeypatch)

    def plan_in(folder: Path) -> tuple[Campaign, dict[str, Path]]:
        plan, runs = Campaign(folder), {}
        network = NetworkConfig(domain="real", width=0.01, init="he")
        plain = replace(experiment, network=network, training=replace(tiny_training, epochs=1))
        runs["twin"] = plan.add(replace(plain, task="speaker"))
        runs["baseline"] = plan.add(plain)
        runs["single"] = plan.add(replace(plain, anti_transfer=AntiTransferConfig(runs["twin"], [2])))
        return plan, runs

    return plan_in


def times(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*") if ".lock" not in f.name}


def test_a_plan_trains_what_is_missing_wherever_it_was_moved(tiny: PlanIn, tmp_path: Path) -> None:
    plan, _ = tiny(tmp_path / "first")
    outcomes = train(plan, LOCAL)
    assert [outcome.status for outcome in outcomes] == ["finished"] * 3
    assert [outcome.path for outcome in outcomes] == list(plan.trainings)
    assert plan.finished() == set(plan.trainings)
    before = times(plan.folder / "runs")
    assert train(plan, LOCAL) == outcomes
    assert times(plan.folder / "runs") == before

    shutil.move(tmp_path / "first", tmp_path / "second")
    moved, again = tiny(tmp_path / "second")
    assert moved.finished() == set(moved.trainings)
    weights = load_file(again["single"] / "model.safetensors")
    shutil.rmtree(again["single"])
    kept = times(moved.folder / "runs")
    assert [outcome.status for outcome in train(moved, LOCAL)] == ["finished"] * 3
    after = times(moved.folder / "runs")
    assert {name: after[name] for name in kept if name != "."} == {name: kept[name] for name in kept if name != "."}
    retrained = load_file(again["single"] / "model.safetensors")
    assert all(torch.equal(retrained[name], tensor) for name, tensor in weights.items())


def test_what_builds_on_a_failure_waits_and_the_rest_goes_on(tiny: PlanIn, tmp_path: Path) -> None:
    plan, runs = tiny(tmp_path)
    runs["twin"].mkdir(parents=True)
    (runs["twin"] / "model.safetensors").mkdir()  # the twin cannot write its weights
    status = {outcome.path: outcome for outcome in train(plan, LOCAL)}
    names = {name: status[path.relative_to(tmp_path)] for name, path in runs.items()}
    assert {name: one.status for name, one in names.items()} == {
        "twin": "failed",
        "baseline": "finished",
        "single": "waiting",
    }
    assert runs["twin"].name in names["single"].error
    assert not runs["single"].exists()
    shutil.rmtree(runs["twin"])
    assert {outcome.status for outcome in train(plan, LOCAL)} == {"finished"}


def test_a_finished_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    plan = Campaign(tmp_path)
    run = chain(plan)["baseline"]
    theirs = replace(plan.trainings[run.relative_to(tmp_path)], task="word")
    run.mkdir(parents=True)
    write_json(run / "result.json", {"experiment": to_plain(theirs)})
    with pytest.raises(ValueError, match=f"{run.name}: holds a run with task 'word', and this one has 'emotion'"):
        plan.finished()
    assert read_json(run / "result.json")["experiment"]["task"] == "word"


def test_the_files_of_a_plan_are_of_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two at the same time: each file is written under the one lock."""
    written = []

    def write(path: Path, text: str) -> None:
        with pytest.raises(Busy), held(lock_of(tmp_path / "plan.csv")):
            pass
        written.append(path.name)

    monkeypatch.setattr(plan_module, "write_text", write)
    Campaign(tmp_path).write({"design": "grid"})
    assert written == ["plan.csv", "campaign.yaml"]
