import json
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest

from qat.campaign.inquiry import Inquiry
from qat.campaign.study import Study, recorded, synthetic
from qat.config import Experiment

GRAMS = ("channel", "position", "batch")


@pytest.fixture(params=["synthetic", "recorded"])
def inquiry(request, tmp_path) -> Inquiry:
    material = synthetic(tmp_path / "corpus") if request.param == "synthetic" else recorded(tmp_path)
    return Inquiry(tmp_path, material, seeds=(1, 2, 3, 4, 5))


def named(inquiry: Inquiry, seed: int) -> dict[str, Experiment]:
    return {path.parts[1]: e for path, e in inquiry.trainings().items() if path.name == f"seed{seed}"}


def test_every_setting_has_every_seed_in_a_folder_of_its_own(inquiry):
    settings = [set(named(inquiry, seed)) for seed in inquiry.seeds]
    assert all(names == settings[0] for names in settings)
    assert len(inquiry.trainings()) == 5 * len(settings[0])
    assert len(set(map(repr, inquiry.trainings().values()))) == len(inquiry.trainings())


def test_seeds_draw_the_split_too_and_share_it_between_settings(inquiry):
    for seed in inquiry.seeds:
        for experiment in named(inquiry, seed).values():
            assert experiment.training.seed == experiment.split.seed == seed
            assert experiment.split == replace(inquiry.material.split(seed), seed=seed)


def test_each_anti_transfer_differs_from_its_baseline_in_nothing_else(inquiry):
    for seed in (1, 4):
        runs = named(inquiry, seed)
        for name, experiment in runs.items():
            base = runs[name.partition("-at-")[0]]
            assert replace(experiment, anti_transfer=base.anti_transfer) == base
            transfers = "-at-" in name
            assert experiment.anti_transfer.beta == (1.0 if transfers else 0.0)
            if not transfers:
                assert experiment.anti_transfer.layers == [2, 7, 13]  # what is watched is probed


def test_names_say_what_is_compared(inquiry):
    for name, experiment in named(inquiry, 1).items():
        at, start = experiment.anti_transfer, experiment.training.initial
        real = "real-" if experiment.network.domain == "real" else ""
        began = f"{real}from-{start.name.removeprefix('real-') if start else 'random'}"
        if at.beta:
            twin = at.twin.name.removeprefix("real-") if at.twin else "random"
            gram, centred = at.loss.gram
            assert name == f"{began}-at-{twin}-{gram}-{at.layers[0]}"
            assert at.random_twin == (twin == "random")
            assert centred == (gram == "batch")
        else:
            assert name == began


def test_what_the_question_needs_is_there(inquiry):
    names = set(named(inquiry, 1))
    for start in ("random", "voice"):
        assert {f"from-{start}-at-voice-channel-{layer}" for layer in (2, 7, 13)} < names
        assert {f"from-{start}-at-voice-{gram}-13" for gram in GRAMS} < names
    assert {f"from-voice-at-random-{gram}-13" for gram in GRAMS} < names
    assert {f"from-word-at-word-{gram}-13" for gram in GRAMS} < names
    assert {f"real-from-voice-at-voice-channel-{layer}" for layer in (2, 7, 13)} < names
    assert {"from-random", "from-voice", "from-word", "real-from-voice"} < names


def test_the_real_network_has_a_real_twin(inquiry):
    twins = inquiry.twins()
    for name, experiment in named(inquiry, 1).items():
        paths = [path for path in (experiment.training.initial, experiment.anti_transfer.twin) if path]
        for path in paths:
            twin = twins[path.relative_to(inquiry.folder)]
            assert twin.network.domain == experiment.network.domain == ("real" if "real" in name else "quaternion")
            assert twin.network.width == experiment.network.width


def test_layers_and_the_real_network_can_be_left_out(inquiry):
    small = replace(inquiry, layers=(13,), real=False)
    names = set(named(small, 1))
    assert names < set(named(inquiry, 1))
    assert all(name.endswith("-13") or "-at-" not in name for name in names)
    assert not any("real" in name for name in [*names, *map(str, small.twins())])
    assert any("real network" in text for text in small.not_run())


class Few(Inquiry):
    """Some settings of each kind, so that the test is quick."""

    def trainings(self) -> dict[Path, Experiment]:
        kept = {
            "from-random-at-voice-batch-13": "from-random",
            "from-voice-at-voice-position-13": "from-voice",
            "from-voice-at-random-position-13": "from-voice",
            "real-from-voice-at-voice-channel-13": "real-from-voice",
        }
        names = {*kept, *kept.values()}
        return {path: e for path, e in super().trainings().items() if path.parts[1] in names}


def test_a_brief_one_leaves_out_what_it_says(inquiry):
    brief = replace(inquiry, layers=(13,), real=False, brief=True)
    assert set(named(brief, 1)) == {
        *("from-random", "from-random-at-voice-channel-13", "from-random-at-word-channel-13"),
        *("from-voice", *(f"from-voice-at-voice-{gram}-13" for gram in GRAMS), "from-voice-at-random-channel-13"),
        *("from-word", "from-word-at-word-channel-13", "from-word-at-random-channel-13"),
    }
    assert len(brief.not_run()) == len(replace(brief, brief=False).not_run()) + 1


@pytest.mark.slow
def test_an_inquiry_runs_to_a_report_that_says_what_was_not_run(tiny_study):
    given = {field.name: getattr(tiny_study, field.name) for field in fields(Study)}
    inquiry = Few(**given | {"seeds": (1, 2)}, layers=(13,), real_width=0.01, real_epochs=1)
    report = inquiry.run()
    assert len(list(inquiry.folder.glob("emotion/*/seed?/analysis.json"))) == 2 * 7
    watched = json.loads((inquiry.folder / "emotion/from-random/seed1/analysis.json").read_text())
    assert set(watched["layers"]) == {"13"}
    table = pd.read_csv(inquiry.folder / "differences.csv")
    pairs = set(map(tuple, table[["name", "against", "other"]].drop_duplicates().to_numpy()))
    assert pairs == {
        ("from-random-at-voice-batch-13", "baseline", "from-random"),
        ("from-voice-at-voice-position-13", "baseline", "from-voice"),
        ("from-voice-at-voice-position-13", "control", "from-voice-at-random-position-13"),
        ("from-voice-at-random-position-13", "baseline", "from-voice"),
        ("real-from-voice-at-voice-channel-13", "baseline", "real-from-voice"),
    }
    assert all(sentence.partition(",")[0] in report.read_text() for sentence in inquiry.not_run())
