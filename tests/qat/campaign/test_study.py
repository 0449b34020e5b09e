"""Designs: what `qat demo` and `qat study` compare, on which speech, and that they run to a report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.linear_model import LogisticRegression

from qat import cli
from qat.campaign.grid import plan_grid
from qat.campaign.jobs import train
from qat.campaign.options import Layout, Selection
from qat.campaign.plan import Campaign
from qat.campaign.study import DESIGNS, SPEECHES, obtain, plan_study, read_design, read_speech
from qat.commands.parser import instance
from qat.config import Experiment, RHEmoExperiment, to_plain
from qat.config.preset import read_overrides
from qat.data.corpora import demo
from qat.results.probes import linear_probe, shortcut_rate
from qat.training.data import read_corpus

STUDY = read_design("study")


def planned(folder: Path, design: str = "study", speech: str = "synthetic", **options: object) -> Campaign:
    return plan_study(folder, read_design(design), read_speech(speech), **options)


def runs_of(campaign: Campaign, seed: int = 1) -> dict[str, Experiment]:
    """The emotion trainings of a seed by their names."""
    emotion = campaign.table[(campaign.table["stage"] == "emotion") & (campaign.table["seed"] == seed)]
    assert emotion["name"].is_unique
    return {
        row["name"]: cast("Experiment", campaign.trainings[Path("runs") / row["run"]]) for _, row in emotion.iterrows()
    }


def beforehand(campaign: Campaign) -> dict[str, Any]:
    """The other trainings, each an experiment of its stage's kind, by their names."""
    stage = campaign.table[campaign.table["stage"] != "emotion"]
    return {row["name"]: campaign.trainings[Path("runs") / row["run"]] for _, row in stage.iterrows()}


def named(campaign: Campaign, path: Path) -> str:
    return campaign.names[Path("runs") / path.name]


def test_no_pretrained_network_hears_a_voice_of_the_emotion_validation_or_test(tmp_path: Path) -> None:
    demo.make(tmp_path / "corpora/demo", sentences=demo.SENTENCES[:1], words=demo.WORDS[:1], progress=False)
    campaign = planned(tmp_path, "demo")
    heard = {
        speaker
        for experiment in beforehand(campaign).values()
        for speaker in read_corpus(experiment.corpus).table["speaker"]
    }
    splits = [experiment.split for experiment in runs_of(campaign).values()]
    unseen = {speaker for split in splits for speaker in (*split.validation, *split.test)}
    assert len(beforehand(campaign)) == 4
    assert heard == set(demo.VOICES["train"])
    assert unseen == {*demo.VOICES["validation"], *demo.VOICES["test"]}
    assert not heard & unseen


def test_recorded_study_learns_voices_and_emotions_from_different_people(tmp_path: Path) -> None:
    campaign = planned(tmp_path, "demo", "recorded")
    assert {one.corpus.name for one in beforehand(campaign).values()} == {"fillets"}
    assert {one.corpus.name for one in runs_of(campaign).values()} == {"hedgewars"}
    assert beforehand(campaign)["word quaternion"].task == "word-presence"
    assert {one.corpus.folder.parent for one in campaign.trainings.values()} == {tmp_path / "corpora"}


def test_comparisons_differ_in_one_thing_only(tmp_path: Path) -> None:
    campaign = planned(tmp_path, "demo", seeds=[1, 2])
    for seed in (1, 2):
        runs = runs_of(campaign, seed)
        assert len(runs) == 6
        for name, baseline in (("at-speaker", "baseline"), ("from-speaker-at-speaker", "from-speaker")):
            a, b = runs[name], runs[baseline]
            assert replace(a, anti_transfer=b.anti_transfer) == b
            assert (a.anti_transfer.beta, b.anti_transfer.beta) == (1.0, 0.0)
            assert a.anti_transfer.layers == b.anti_transfer.layers == [13]
        assert runs["from-speaker-at-random"].anti_transfer.twin is None
        assert runs["from-speaker-at-random"].anti_transfer.random_twin
        assert {run.training.seed for run in runs.values()} == {seed}
    assert campaign.probed == {
        path for path, one in campaign.trainings.items() if getattr(one, "task", "") == "emotion"
    }


@pytest.fixture(scope="module", params=SPEECHES)
def study(request: pytest.FixtureRequest) -> Campaign:
    return planned(Path("study"), "study", request.param)


def test_every_setting_has_every_seed(study: Campaign) -> None:
    settings = [set(runs_of(study, seed)) for seed in range(1, 6)]
    assert all(names == settings[0] for names in settings)
    assert len(settings[0]) == 26
    assert len(study.trainings) == 5 * 26 + 5


def test_seeds_draw_the_split_too_and_share_it_between_settings(study: Campaign) -> None:
    for seed in range(1, 6):
        for experiment in runs_of(study, seed).values():
            assert experiment.training.seed == experiment.split.seed == seed
            assert experiment.split == replace(runs_of(study, 1)["from-random"].split, seed=seed)


def test_each_anti_transfer_differs_from_its_baseline_in_nothing_else(study: Campaign) -> None:
    for seed in (1, 4):
        runs = runs_of(study, seed)
        for name, experiment in runs.items():
            base = runs[name.partition("-at-")[0]]
            assert replace(experiment, anti_transfer=base.anti_transfer) == base
            transfers = "-at-" in name
            assert experiment.anti_transfer.beta == (1.0 if transfers else 0.0)
            if not transfers:
                assert experiment.anti_transfer.layers == [2, 7, 13]  # what is watched is probed


def test_names_say_what_is_compared(study: Campaign) -> None:
    for name, experiment in runs_of(study).items():
        at, start = experiment.anti_transfer, experiment.training.initial
        real = "real-" if experiment.network.domain == "real" else ""
        began = f"{real}from-{named(study, start).split()[0] if start else 'random'}"
        if at.beta:
            twin = named(study, at.twin).split()[0] if at.twin else "random"
            loss = next(loss for loss in STUDY.losses if f"-{loss}-" in name)
            assert name == f"{began}-at-{twin}-{loss}-{at.layers[0]}"
            assert at.random_twin == (twin == "random")
            assert STUDY.losses[loss].items() <= to_plain(at).items()
        else:
            assert name == began


def test_what_the_question_needs_is_there(study: Campaign) -> None:
    names = set(runs_of(study))
    for start in ("random", "speaker"):
        assert {f"from-{start}-at-speaker-channel-{layer}" for layer in (2, 7, 13)} < names
        assert {f"from-{start}-at-speaker-{loss}-13" for loss in STUDY.losses} < names
    assert {f"from-speaker-at-random-{loss}-13" for loss in STUDY.losses} < names
    assert {f"from-word-at-word-{loss}-13" for loss in STUDY.losses} < names
    assert {f"real-from-speaker-at-speaker-channel-{layer}" for layer in (2, 7, 13)} < names
    assert {"from-random", "from-speaker", "from-word", "real-from-speaker"} < names


def test_the_real_network_has_a_real_twin(study: Campaign) -> None:
    for name, experiment in runs_of(study).items():
        for path in (experiment.training.initial, experiment.anti_transfer.twin):
            if path is not None:
                twin: Any = study.trainings[Path("runs") / path.name]
                assert twin.network.domain == experiment.network.domain == ("real" if "real" in name else "quaternion")
                assert twin.network.width == experiment.network.width


def test_layers_and_the_real_network_can_be_left_out(tmp_path: Path) -> None:
    design = replace(STUDY, layers=[13], real=False)
    names = set(runs_of(plan_study(tmp_path, design, read_speech("synthetic"))))
    assert names < set(runs_of(planned(tmp_path)))
    assert all(name.endswith("-13") or "-at-" not in name for name in names)
    assert not any("real" in name for name in names)
    assert any("real network" in text for text in design.remarks())
    assert "layer 13 of 13" in design.remarks()[0]


def test_a_brief_one_leaves_out_what_it_says(tmp_path: Path) -> None:
    brief = replace(STUDY, layers=[13], real=False, brief=True)
    assert set(runs_of(plan_study(tmp_path, brief, read_speech("synthetic")))) == {
        *("from-random", "from-random-at-speaker-channel-13", "from-random-at-word-channel-13"),
        *("from-speaker", *(f"from-speaker-at-speaker-{loss}-13" for loss in STUDY.losses)),
        "from-speaker-at-random-channel-13",
        *("from-word", "from-word-at-word-channel-13", "from-word-at-random-channel-13"),
    }
    assert len(brief.remarks()) == len(replace(brief, brief=False).remarks()) + 1


def test_demo_grid_and_train_mean_the_same_training(tmp_path: Path) -> None:
    campaign = planned(tmp_path, "demo")
    folder = tmp_path / "corpora/demo"
    selection = Selection(["demo"], ["quaternion"], ["confounded"], ["none", "single_S", "single_W"], [13])
    grid = plan_grid(tmp_path, "demo", selection, folders={"demo": folder})
    runs = {name: path for path, name in campaign.names.items()}
    pairs = {
        "emotion quaternion demo confounded single_S layer 13": "at-speaker",
        "emotion quaternion demo confounded single_W layer 13": "at-word",
        **{name: name for name in ("rhemo-1", "rhemo-2", "word quaternion", "speaker quaternion")},
    }
    assert {name: grid.names.get(runs[name]) for name in pairs.values()} == {name: key for key, name in pairs.items()}

    parser, _ = cli.build_parser()
    corpus = ["--preset", "demo", "--corpus.folder", str(folder), "--out", "x"]
    rhemo = ["--network.rhemo", str(tmp_path / runs["rhemo-2"])]
    twin = ["--anti_transfer.twin", str(tmp_path / runs["speaker quaternion"]), "--anti_transfer.layers", "[13]"]
    for words, more, name in (
        (["pretrain", "rhemo"], [], "rhemo-1"),
        (["pretrain", "rhemo"], ["--training.initial", str(tmp_path / runs["rhemo-1"])], "rhemo-2"),
        (["pretrain", "words"], rhemo, "word quaternion"),
        (["pretrain", "speakers"], rhemo, "speaker quaternion"),
        (["train"], [*rhemo, *twin, "--split.rule", "confounded"], "at-speaker"),
    ):
        options = parser.instantiate(parser.parse_args([*words, *corpus, *more]))
        for word in words:
            options = options[word]
        kind = RHEmoExperiment if name.startswith("rhemo") else Experiment
        assert campaign.address(instance(kind, options)) == runs[name].name


def test_the_demo_may_be_planned_with_the_papers_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--preset", "paper", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    campaign = planned(Path("runs/demo-synthetic"), "demo", preset="paper")
    assert [run["run"] for run in told["runs"]] == [path.name for path in campaign.trainings]
    assert (told["trainings"], told["finished"], list(tmp_path.iterdir())) == (4 + 6, 0, [])
    stages: dict[str, Any] = {run["stage"]: campaign.trainings[Path("runs") / run["run"]] for run in told["runs"]}
    assert {one.corpus.name for one in stages.values()} == {"demo"}
    expected = {
        "rhemo-1": (1e-3, 50),
        "rhemo-2": (1e-6, 20),
        "word": (5e-5, 300),
        "speaker": (5e-5, 300),
        "emotion": (1e-5, 20),
    }
    assert {name: (one.training.lr, one.training.batch) for name, one in stages.items()} == expected
    assert stages["emotion"].network.width == 1.0


def test_a_design_of_ones_own_may_have_second_halves(tmp_path: Path) -> None:
    design, speech = tmp_path / "my.yaml", tmp_path / "speech.yaml"
    entries = [{"name": "first", "against": "word", "layer": 3}, {"name": "second", "start": "first"}]
    design.write_text(yaml.safe_dump({"emotion": entries, "seeds": 2, "layers": [4]}))
    own = [{"when": {"stage": "speaker"}, "settings": {"corpus": {"name": "tess", "options": {}}}}]
    speech.write_text(yaml.safe_dump({"about": "mine", "corpus": "ravdess", "settings": own}))
    campaign = plan_study(tmp_path, read_design(design), read_speech(speech), folders={"tess": tmp_path / "t"})
    for seed in (1, 2):
        runs = runs_of(campaign, seed)
        assert (runs["first"].anti_transfer.layers, runs["second"].anti_transfer.layers) == ([3], [4])
        assert named(campaign, runs["second"].training.initial) == "first"
        first = campaign.trainings[Path("runs") / runs["second"].training.initial.name]
        assert first == runs["first"]
        assert runs["first"].training.lr == 1e-3, "of the small preset"
    assert beforehand(campaign)["speaker quaternion"].corpus.folder == tmp_path / "t"
    with pytest.raises(ValueError, match=r"^iemocap: no folder .*--folders '\{iemocap: DIR\}'$"):
        obtain(campaign)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("emotion: []\nsede: 3", "unknown setting sede; Design has emotion, seeds, "),
        ("emotion: [{start: word}]", "emotion\\[0\\]: must have name"),
        ("[]", "\\[\\] must be a mapping of settings"),
        ("emotion: [{name: a, against: nobody}]", "a: against: 'nobody' must be one of speaker, word, random"),
        ("emotion: [{name: a, loss: channel}]", "a: loss: 'channel' must be one of"),
        ("emotion: [{name: a, layer: [14]}]", "a: layer: 14 must be one of each, last, 1, 2"),
        ("emotion: [{name: a}]\nlayers: [0]", "layers: \\[0\\] must be one or more of 1 to 13"),
        ("emotion: [", "not readable as YAML"),
    ],
)
def test_a_wrong_design_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_design(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert "\n" not in str(raised.value)


def test_a_start_that_is_not_there_is_named(tmp_path: Path) -> None:
    design = replace(read_design("demo"), emotion=[replace(STUDY.emotion[0], name="a", start="b")])
    with pytest.raises(ValueError, match="a: start: 'b' must be random, speaker, word or an earlier entry"):
        plan_study(tmp_path, design, read_speech("synthetic"))


def test_packaged_designs_and_speeches_are_readable() -> None:
    assert [read_design(name).emotion[0].name for name in DESIGNS] == ["baseline", "from-{start}"]
    for name in SPEECHES:
        read_overrides(read_speech(name).preset)


@pytest.mark.timeout(1200)
def test_a_demo_runs_from_recordings_to_a_report_and_keeps_what_is_finished(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["demo", "--out", str(out), *tiny, "--json"]
    assert cli.main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["problems"] == []
    report = Path(told["report"])
    assert report.is_file()
    assert len(told["summary"]) == 2 + 2 + 6
    assert {"baseline", "at-speaker", "rhemo-1"} < {row["name"] for row in told["summary"]}
    parts = [row["part"] for row in told["time"]]
    assert parts[:2] == ["speech", "trainings, side by side"]
    assert parts[-1] == "report"
    assert sum(row["seconds"] for row in told["time"][2:-1]) >= 1  # of each training
    probes = sorted(out.glob("runs/*/analysis.json"))
    assert len(probes) == 6
    for path in probes:
        analysis = json.loads(path.read_text())
        assert 0 <= analysis["shortcut_rate"] <= 1
        assert 0 <= analysis["voice_probe"] <= 1
        assert 0 <= analysis["word_probe"] <= 1
        assert analysis["layers"] == {"13": {name: analysis[name] for name in ("voice_probe", "word_probe")}}
    about = yaml.safe_load((out / "campaign.yaml").read_text())
    assert (about["design"], about["speech"], about["preset"]) == ("demo", "synthetic", "demo")
    assert "ynthesised speech" in report.read_text()
    results = list(out.glob("runs/*/result.json"))
    assert len(results) == 10
    before = {path: path.stat().st_mtime_ns for path in results}
    assert cli.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in results} == before


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_study_runs_to_a_report_that_says_what_was_not_run(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = {"from-random-at-speaker-batch-13", "from-speaker-at-speaker-position-13", "from-random", "from-speaker"}
    names = "from-{start}-at-{against}-{loss}-{layer}"
    plain = {
        "seeds": 2,
        "layers": [13],
        "losses": STUDY.losses,
        "emotion": [
            {"name": "from-{start}", "start": ["random", "speaker"], "watch": True},
            {"name": names, "start": "random", "loss": "batch"},
            {"name": names, "start": "speaker", "loss": "position"},
            {"name": names, "start": "speaker", "against": "random", "loss": "position"},
            {"name": "real-from-{start}", "start": "speaker", "network": "real", "watch": True},
            {"name": f"real-{names}", "start": "speaker", "network": "real", "loss": "channel"},
        ],
        "not_run": [{"text": remark.text, "real": remark.real, "brief": remark.brief} for remark in STUDY.not_run],
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(plain))
    out = tmp_path / "out"
    assert cli.main(["study", "--design", str(tmp_path / "my.yaml"), "--out", str(out), *tiny, "--json"]) == 0
    report = Path(json.loads(capsys.readouterr().out)["report"])
    assert len(list(out.glob("runs/*/analysis.json"))) == 2 * 7
    table = pd.read_csv(out / "differences.csv")
    pairs = set(map(tuple, table[["name", "against", "other"]].drop_duplicates().to_numpy()))
    assert pairs == {
        ("from-random-at-speaker-batch-13", "baseline", "from-random"),
        ("from-speaker-at-speaker-position-13", "baseline", "from-speaker"),
        ("from-speaker-at-speaker-position-13", "control", "from-speaker-at-random-position-13"),
        ("from-speaker-at-random-position-13", "baseline", "from-speaker"),
        ("real-from-speaker-at-speaker-channel-13", "baseline", "real-from-speaker"),
    }
    assert keep < set(table["name"]) | set(table["other"])
    assert all(
        sentence.partition(",")[0] in report.read_text() for sentence in read_design(tmp_path / "my.yaml").remarks()
    )


def test_shortcut_rate_counts_answers_that_are_the_voices_own_emotion() -> None:
    predictions = pd.DataFrame(
        [("train", "a", "sad", "sad"), ("train", "a", "sad", "sad"), ("train", "a", "happy", "sad"),
         ("train", "b", "angry", "sad"), ("withheld", "a", "happy", "sad"), ("withheld", "a", "happy", "happy"),
         ("withheld", "b", "sad", "angry"), ("withheld", "b", "sad", "sad"), ("test", "c", "sad", "sad")],
        columns=["part", "speaker", "label", "predicted"],
    )  # fmt: skip
    assert shortcut_rate(predictions) == 0.5


def test_linear_probe_finds_what_is_there_and_not_what_is_not(rng: np.random.Generator) -> None:
    labels = np.repeat(["x", "y", "z"], 60).astype(object)
    texts = np.tile([f"t{i}" for i in range(20)], 9).astype(object)
    noise = rng.normal(size=(180, 30)).astype(np.float32)
    assert linear_probe(noise, labels, texts) < 0.65
    signal = noise.copy()
    for column, label in enumerate("xyz"):
        signal[:, column] += 6 * (labels == label)
    assert linear_probe(signal, labels, texts) > 0.9


def test_linear_probe_is_logistic_regression_on_standardised_features_of_any_number(rng: np.random.Generator) -> None:
    labels = np.tile(["x", "y", "z"], 40).astype(object)
    texts = np.repeat([f"t{i:02d}" for i in range(24)], 5).astype(object)
    for width in (7, 500):
        x = rng.normal(size=(120, width)).astype(np.float32) + 0.3 * (labels[:, None] == "x")
        tested = np.isin(texts, sorted(set(texts))[::4])
        mean, deviation = x[~tested].mean(0), x[~tested].std(0)
        z = (x - mean) / deviation
        plain = LogisticRegression(C=0.1, max_iter=5000, tol=1e-8).fit(z[~tested], labels[~tested])
        answers = plain.predict(z[tested])
        assert linear_probe(x, labels, texts) == pytest.approx((answers == labels[tested]).mean(), abs=1.01 / 30)


def test_linear_probe_is_tested_on_texts_that_it_has_not_seen() -> None:
    """Features that are the text itself tell the voice of every text, unless the text is new."""
    texts = np.array([f"t{i:02d}" for i in range(16)], dtype=object)
    labels = np.array(["x", "y"] * 8, dtype=object)
    assert linear_probe(np.eye(16, dtype=np.float32), labels, texts) < 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_demo_learns_emotions_of_unseen_voices_over_three_seeds(tmp_path: Path) -> None:
    design = replace(read_design("demo"), emotion=read_design("demo").emotion[:1])
    campaign = plan_study(tmp_path, design, read_speech("synthetic"), seeds=[1, 2, 3])
    obtain(campaign)
    outcomes = {campaign.names[one.path]: one for one in train(campaign, Layout(cluster="local", at_once=2))}
    for stage in ("rhemo-1", "rhemo-2"):
        for part in outcomes[stage].result["parts"].values():
            assert part["reconstruction"] < 0.75 * part["constant"]
            assert part["live_channels"] == 4
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/result.json")]
    accuracies = [one["parts"]["test"]["accuracy"] for one in results if one["name"] == "baseline"]
    assert len(accuracies) == 3
    assert np.mean(accuracies) >= 0.45
