from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qat import cli
from qat.commands.parser import Parser
from qat.config import Experiment, RHEmoExperiment, flatten, to_plain
from qat.config.preset import NAMES, experiment, merge, read_overrides, settings_of

STAGES = ("rhemo-1", "rhemo-2", "word", "speaker", "emotion")
NETWORKS = ("quaternion", "real")


def made(preset: str, stage: str, **place: object) -> Any:
    """An experiment of the stage's kind."""
    return experiment(settings_of(stage, place, read_overrides(preset)), stage)


def emotion(
    preset: str, network: str, at: str = "single_S", corpus: str = "iemocap", split: str = "random"
) -> Experiment:
    run: Experiment = made(preset, "emotion", network=network, corpus=corpus, split=split, at=at, layer=2, seed=1)
    return run


# What paper and released code say, item by item: setting, preset paper, preset released-code.
ITEMS = [
    ("anti_transfer.loss", "gram-channel", {"name": "folded-rowwise", "clamp": "product"}),
    ("anti_transfer.beta", 1.0, 1.0),
    ("anti_transfer.position", "relu", "pool5"),
    ("anti_transfer.random_twin", False, True),
    ("features.time_order", "natural", "reversed"),
    ("features.cut", "audio", "reference"),
    ("training.batch", 20, 40),
    ("training.stopping", "standard", "reference-window"),
    ("training.accuracy", "samples", "batches"),
    ("training.lr", 1e-5, 1e-5),
    ("training.patience", 20, 20),
    ("training.epochs", 1000, 1000),
    ("training.weight_decay", 0.0, 0.0),
    ("training.keep", "best", "best"),
    ("network.width", 1.0, 1.0),
    ("network.dropout", 0.5, 0.5),
    (
        "corpus.where",
        {"emotion": ["angry", "happy", "neutral", "sad"]},
        {"emotion": ["angry", "happy", "neutral", "sad"]},
    ),
]
OF_A_NETWORK = [
    ("quaternion", "network.rhemo_mode", "trainable", "batch-statistics"),
    ("quaternion", "network.adaptive_pool", False, False),
    ("quaternion", "network.init", "default", "default"),
    ("quaternion", "normalisation", "paper", "paper"),
    ("real", "network.adaptive_pool", True, False),
    ("real", "network.init", "default", "pytorch"),
    ("real", "normalisation", "paper", "max"),
]


@pytest.mark.parametrize(("setting", "paper", "code"), ITEMS)
@pytest.mark.parametrize("network", NETWORKS)
def test_emotion_presets_take_each_side(network: str, setting: str, paper: Any, code: Any) -> None:
    for preset, value in (("paper", paper), ("released-code", code)):
        assert flatten(to_plain(emotion(preset, network)))[setting] == value


@pytest.mark.parametrize(("network", "setting", "paper", "code"), OF_A_NETWORK)
def test_network_presets_take_each_side(network: str, setting: str, paper: Any, code: Any) -> None:
    for preset, value in (("paper", paper), ("released-code", code)):
        for stage in ("word", "speaker"):
            assert flatten(to_plain(made(preset, stage, network=network)))[setting] == value
        assert flatten(to_plain(emotion(preset, network)))[setting] == value


@pytest.mark.parametrize("preset", ["paper", "released-code"])
def test_hyperparameters_of_what_is_trained_beforehand(preset: str) -> None:
    first, second = made(preset, "rhemo-1"), made(preset, "rhemo-2")
    expected = {"lr": 1e-3, "batch": 50, "patience": 100, "weight_decay": 0.0, "epochs": 200_000}
    assert {name: getattr(first.training, name) for name in expected} == expected
    assert first.rhemo.beta == 0
    assert first.corpus.where == {}
    expected = {"lr": 1e-6, "batch": 20, "patience": 30, "weight_decay": 1e-5, "epochs": 200_000}
    assert {name: getattr(second.training, name) for name in expected} == expected
    assert (second.rhemo.beta, second.rhemo.beta_class, second.rhemo.beta_vad) == (0.01, 1, 100)
    assert second.corpus.where == {"emotion": ["angry", "happy", "neutral", "sad"]}
    for stage, epochs, batches in (("word", 500, (300, 40, 38)), ("speaker", 1000, (300, 40, 40))):
        quaternion, real = (made(preset, stage, network=network) for network in NETWORKS)
        for one in (quaternion, real):
            assert (one.training.lr, one.training.epochs, one.training.patience) == (5e-5, epochs, 20)
        assert quaternion.training.batch == batches[0]
        assert real.training.batch == batches[1 if preset == "paper" else 2]


def test_words_and_speakers() -> None:
    for network in NETWORKS:
        paper, code = (made(preset, "speaker", network=network) for preset in ("paper", "released-code"))
        assert paper.corpus.options.get("speaker", "actor") == "actor"
        assert code.corpus.options == {"speaker": "session"}
        assert paper.split.rule == code.split.rule == "random"
        paper, code = (made(preset, "word", network=network) for preset in ("paper", "released-code"))
        assert (paper.split.rule, code.split.rule) == ("part", "part-train-only")
        assert (paper.training.word_offset, code.training.word_offset) == ("sample", "batch")
        assert paper.features.cut == code.features.cut == "word"
        assert paper.corpus.name == code.corpus.name == "librispeech"


def test_what_only_some_emotion_trainings_have() -> None:
    for at in ("none", "single_S", "single_W", "dual_SW", "dual_WS"):
        for corpus in ("iemocap", "ravdess", "tess", "emodb"):
            for split in ("random", "actor"):
                for network in NETWORKS:
                    paper, code = (emotion(p, network, at, corpus, split) for p in ("paper", "released-code"))
                    assert paper.split.rule == code.split.rule == ("random" if split == "random" else "paper-actor")
                    assert paper.training.initial_head == "keep"
                    assert code.training.initial_head == ("new" if at.startswith("dual") else "keep")
                    assert paper.network.outputs is None
                    eight = corpus == "emodb" or (corpus, split) == ("tess", "random")
                    assert code.network.outputs == (8 if eight else None)
                    assert code.anti_transfer.random_twin == (at != "none")
                    assert paper.corpus.name == code.corpus.name == corpus


def test_all_stages_of_a_preset_hear_alike() -> None:
    """A checkpoint trained on other inputs is refused, but for the cut."""
    for preset in NAMES:
        heard = set()
        for network in NETWORKS:
            for stage in STAGES:
                one = emotion(preset, network) if stage == "emotion" else made(preset, stage, network=network)
                heard.add(repr(replace(one.features, cut="audio")))
        assert len(heard) == 1


def test_the_demo_trains_what_is_frozen_on_the_training_voices_only() -> None:
    from qat.data.corpora.demo import VOICES

    for stage in STAGES[:-1]:
        one = made("demo", stage, network="quaternion")
        assert one.corpus.name == "demo"
        assert one.corpus.where["speaker"] == list(VOICES["train"])
        assert one.corpus.where["kind"] == ["word" if stage == "word" else "sentence"]
    for name, rule in (("actor", "speaker"), ("confounded", "confounded")):
        split = emotion("demo", "quaternion", corpus="demo", split=name).split
        assert split.rule == rule
        assert {part: list(getattr(split, part)) for part in VOICES} == {part: list(of) for part, of in VOICES.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_demo_is_the_small_preset_on_its_corpus(stage: str, network: str) -> None:
    demo, small = (made(preset, stage, network=network) for preset in ("demo", "small"))
    fields = {"corpus": demo.corpus, "split": demo.split}
    assert replace(small, **fields) == demo


def test_an_override_may_stand_for_another_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("- preset: small\n- settings: {normalisation: max}\n")
    assert read_overrides(file)[:-1] == read_overrides("small")
    file.write_text("- preset: smell\n")
    with pytest.raises(ValueError, match=r"mine.yaml: override 1: preset: 'smell' must be one of paper, "):
        read_overrides(file)


def test_a_training_command_takes_a_preset_and_options_win_over_it(parser: Parser, tmp_path: Path) -> None:
    def parsed(*words: str) -> Any:
        options = parser.instantiate(parser.parse_args([*words, "--out", "x"]))
        for word in words[: words.index(next(word for word in words if word.startswith("--")))]:
            options = options[word]
        return options

    default = parsed("train", "--training.seed", "3")
    small = parsed("train", "--training.epochs", "1000", "--preset", "small", "--network.domain", "real")
    assert (small.network.width, small.training.lr, small.normalisation) == (0.0625, 1e-3, "log")
    assert small.training.epochs == 1000, "though it is the default where there is no preset"
    assert parsed("train", "--training.seed", "3") == default
    (tmp_path / "my.yaml").write_text("training: {epochs: 7}\n")
    both = parsed("train", "--config", str(tmp_path / "my.yaml"), "--preset", "small")
    assert (both.training.epochs, both.training.lr) == (7, 1e-3)
    own = parsed("pretrain", "speakers", "--preset", "demo", "--corpus.name", "csv", "--corpus.folder", "my.csv")
    assert (own.corpus.where, own.corpus.options, own.training.batch) == ({}, {}, 20)
    code = parsed("train", "--preset", "released-code", "--anti_transfer.random_twin", "true")
    assert code.anti_transfer.position == "pool5"
    plain = parsed("train", "--preset", "released-code")
    assert plain.anti_transfer.position == "relu"
    second = parsed("pretrain", "rhemo", "--preset", "paper", "--training.initial", "stage1")
    assert (second.training.lr, second.rhemo.beta) == (1e-6, 0.01)
    paper = parsed("pretrain", "words", "--training.seed", "1")
    assert (paper.task, paper.features.cut, paper.training.batch, paper.training.lr) == ("word", "word", 300, 5e-5)


def test_a_wrong_preset_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--preset", "best", "--out", "x"])
    assert capsys.readouterr().err == (
        "qat train: best: neither a file nor a preset; presets are paper, released-code, demo, small\n"
    )


def test_later_overrides_win_field_by_field(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "- settings: {training: {batch: 7, lr: 0.5}, corpus: {where: {speaker: [ann]}}}\n"
        "- when: {network: [real, quaternion], layer: 3}\n  settings: {training: {batch: 8}}\n"
        "- when: {network: quaternion}\n  settings: {training: {batch: 9}}\n"
    )
    overrides, start = (
        read_overrides(file),
        {"training": {"batch": 1, "seed": 5}, "corpus": {"where": {"kind": ["word"]}}},
    )
    assert merge({"network": "real", "layer": 3}, overrides, start) == {
        "training": {"batch": 8, "seed": 5, "lr": 0.5},
        "corpus": {"where": {"speaker": ["ann"]}},
    }
    assert merge({"network": "real", "layer": 4}, overrides, start)["training"]["batch"] == 7
    assert merge({}, overrides, start)["training"]["batch"] == 7
    assert start == {"training": {"batch": 1, "seed": 5}, "corpus": {"where": {"kind": ["word"]}}}


def test_rhemo_takes_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("- settings: {network: {width: 0.5}, rhemo: {width: 0.25}, normalisation: log}\n")
    overrides = read_overrides(file)
    assert merge({"stage": "rhemo-1"}, overrides, {}) == {"rhemo": {"width": 0.25}, "normalisation": "log"}
    assert merge({"stage": "word"}, overrides, {}) == {"network": {"width": 0.5}, "normalisation": "log"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {batch: 3}", "must be a list of overrides"),
        (
            "- settings: {training: {bach: 3}}",
            "override 1: training.bach: unknown setting; TrainingConfig has lr, ",
        ),
        (
            "- settings: {}\n- settings: {training: {batch: many}}",
            "override 2: training.batch: 'many' must be a whole",
        ),
        ("- settings: {training: 3}", "override 1: training: 3 must be of one setting"),
        ("- settings: {nonsense: {a: 1}}", "override 1: nonsense.a: unknown setting; Experiment has corpus, task, "),
        ("- when: {planet: mars}\n  settings: {}", "override 1: when: 'planet' must be one of stage, network"),
        ("- when: {stage: emotoin}\n  settings: {}", "override 1: when: stage: 'emotoin' must be one of rhemo-1, "),
        ("- when: {layer: [1, 14]}\n  settings: {}", "override 1: when: layer: 14 must be one of 0, 1, 2"),
        ("- when: {layer: '2'}\n  settings: {}", "override 1: when: layer: '2' must be one of 0, 1, 2"),
        ("- when: {stage: word}", "override 1: must have settings"),
        ("- settings: []", "override 1: settings: .* must be a mapping"),
        ("- [", "not readable as YAML"),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_overrides(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_presets_and_values_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="best: neither a file nor a preset; presets are paper, released-code, "):
        read_overrides("best")
    with pytest.raises(ValueError, match=r"emotion: training\.batch: 0 must be at least 1"):
        experiment({"training": {"batch": 0}}, "emotion")


@pytest.fixture(scope="module")
def parser() -> Parser:
    return cli.build_parser()[0]


@pytest.mark.parametrize("preset", NAMES)
@pytest.mark.parametrize(
    ("stage", "network"), [(s, n) for s in STAGES for n in NETWORKS if n == "quaternion" or not s.startswith("rhemo")]
)
def test_qat_preset_prints_a_config_file(
    preset: str, stage: str, network: str, parser: Parser, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    place = ["--corpus", "tess", "--split", "actor", "--at", "dual_SW", "--layer", "5"] if stage == "emotion" else []
    assert cli.main(["preset", preset, "--stage", stage, "--network", network, *place]) == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    verb = {"rhemo-1": "pretrain rhemo", "rhemo-2": "pretrain rhemo", "word": "pretrain words"}.get(stage, "train")
    options = parser.parse_args([*verb.split(), "--config", str(file), "--out", str(tmp_path / "run")])
    options = parser.instantiate(options)
    for word in verb.split():
        options = options[word]
    kind = RHEmoExperiment if stage.startswith("rhemo") else Experiment
    given = kind(**{field.name: options[field.name] for field in fields(kind)})
    labels = {"corpus": "tess", "split": "actor", "at": "dual_SW", "layer": 5} if stage == "emotion" else {}
    expected = flatten(to_plain(made(preset, stage, network=network, **labels)))
    if labels:
        expected["anti_transfer.layers"] = [5]
    assert {k: v for k, v in flatten(to_plain(given)).items() if k != "corpus.folder"} == {
        k: v for k, v in expected.items() if k != "corpus.folder"
    }
    assert yaml.safe_load(file.read_text())
