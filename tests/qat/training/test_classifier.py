import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from qat.anti_transfer import AntiTransfer
from qat.config import (
    AntiTransferConfig,
    CorpusConfig,
    Experiment,
    NetworkConfig,
    RHEmoConfig,
    RHEmoExperiment,
    SplitConfig,
    TrainingConfig,
    from_plain,
    to_plain,
)
from qat.data.manifest import Manifest, build_manifest, write_manifest
from qat.models import VGG16
from qat.training import distributed, loop
from qat.training.checkpoint import load_checkpoint
from qat.training.classifier import train_classifier
from qat.training.inference import evaluate_run, predict
from qat.training.rhemo import pretrain_rhemo
from qkernels.losses import CKA, CosSquared, FoldedRowwise, GramBatch, GramPosition, Loss, MseSigmoid
from tests.qat.training.trainings import same, trained, weights, with_twin


def test_a_run_folder_holds_everything(experiment: Experiment, twin: Path, tmp_path: Path) -> None:
    result = train_classifier(with_twin(experiment, twin, layers=[2, 13]), tmp_path / "run", quiet=True)
    assert {p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith(".lock")} == {
        "experiment.yaml", "split.json", "model.safetensors", "last.safetensors", "metrics.csv", "predictions.csv",
        "result.json", "tensorboard",
    }  # fmt: skip
    assert json.loads((tmp_path / "run/result.json").read_text()) == json.loads(json.dumps(result))
    saved = from_plain(Experiment, yaml.safe_load((tmp_path / "run/experiment.yaml").read_text()))
    assert saved == with_twin(experiment, twin, layers=[2, 13])
    metrics = pd.read_csv(tmp_path / "run/metrics.csv")
    assert len(metrics) == result["epochs"] == 2
    assert result["schema"] == 1
    assert {"commit", "command"} <= result.keys()
    at = metrics["train_similarity_2"] + metrics["train_similarity_13"]
    np.testing.assert_allclose(metrics["train_anti_transfer"], at, rtol=1e-5)
    np.testing.assert_allclose(metrics["train_total"], metrics["train_cross_entropy"] + at, rtol=1e-5)
    predictions = pd.read_csv(tmp_path / "run/predictions.csv")
    for part, expected in result["parts"].items():
        rows = predictions[predictions["part"] == part]
        assert (rows["label"] == rows["predicted"]).mean() == pytest.approx(expected["accuracy"])
        np.testing.assert_allclose(rows.filter(like="p_").sum(axis=1), 1, atol=1e-4)
    split = json.loads((tmp_path / "run/split.json").read_text())
    assert {k: len(v) for k, v in split.items()} == {"train": 25, "validation": 7, "test": 4}


def test_training_learns_the_beeps(experiment: Experiment, tmp_path: Path) -> None:
    network = replace(experiment.network, width=0.1, dropout=0.0, embedding_scale="rms")
    speakers = trained(
        replace(experiment, task="speaker", network=network), epochs=40, patience=40, batch=5, keep="last"
    )
    result = train_classifier(speakers, tmp_path / "run", quiet=True)
    losses = pd.read_csv(tmp_path / "run/metrics.csv")["train_cross_entropy"]
    assert losses.iloc[-1] < 0.6 * losses.iloc[0]
    assert result["parts"]["train"]["accuracy"] > 0.6


def test_same_settings_same_bits_and_another_seed_others(experiment: Experiment, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_classifier(trained(experiment, seed=seed), tmp_path / name, quiet=True)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_an_interrupted_run_resumes_to_the_same_bits(
    experiment: Experiment, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = trained(with_twin(experiment, twin, layers=[7]), epochs=4)
    train_classifier(experiment, tmp_path / "whole", quiet=True)
    epochs = iter(range(10))
    train_epoch = loop.train_epoch

    def interrupted(*arguments: Any) -> Any:
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    monkeypatch.setattr(loop, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(experiment, tmp_path / "broken", quiet=True)
    assert not (tmp_path / "broken/result.json").exists()
    with pytest.raises(ValueError, match="holds an interrupted run"):
        train_classifier(experiment, tmp_path / "broken", quiet=True)
    with pytest.raises(ValueError, match=r"holds a run with training\.lr 0\.001, and this one has 0\.01"):
        train_classifier(trained(experiment, lr=1e-2), tmp_path / "broken", resume=True, quiet=True)
    settings = (tmp_path / "broken/experiment.yaml").read_text()
    assert yaml.safe_load(settings) == to_plain(experiment)
    (tmp_path / "broken/experiment.yaml").unlink()
    with pytest.raises(ValueError, match=r"last\.safetensors: state of another experiment"):
        train_classifier(trained(experiment, seed=7), tmp_path / "broken", resume=True, quiet=True)
    (tmp_path / "broken/experiment.yaml").write_text(settings)
    train_classifier(experiment, tmp_path / "broken", resume=True, quiet=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    whole, broken = (
        pd.read_csv(tmp_path / name / "metrics.csv").drop(columns="seconds") for name in ("whole", "broken")
    )
    pd.testing.assert_frame_equal(whole, broken)


def test_a_finished_run_is_kept(experiment: Experiment, tmp_path: Path) -> None:
    result = train_classifier(experiment, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="holds a finished run"):
        train_classifier(experiment, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"holds a run with training\.seed \d+, and this one has 9"):
        train_classifier(trained(experiment, seed=9), tmp_path / "run", resume=True, quiet=True)
    assert train_classifier(experiment, tmp_path / "run", resume=True, quiet=True) == json.loads(json.dumps(result))


def test_the_best_epoch_is_kept_and_the_last_on_request(experiment: Experiment, tmp_path: Path) -> None:
    experiment = trained(experiment, lr=3e-2, epochs=5, patience=5)
    results = {}
    for keep in ("best", "last"):
        results[keep] = train_classifier(trained(experiment, keep=keep), tmp_path / keep, quiet=True)
    losses = pd.read_csv(tmp_path / "best/metrics.csv")["validation_total"]
    assert results["best"]["kept_epoch"] == losses.idxmin()
    assert results["best"]["parts"]["validation"]["total"] == pytest.approx(losses.min(), rel=1e-5)
    assert results["last"]["kept_epoch"] == 4
    assert results["last"]["parts"]["validation"]["total"] == pytest.approx(losses.iloc[-1], rel=1e-5)


def test_early_stopping_stops(experiment: Experiment, tmp_path: Path) -> None:
    result = train_classifier(trained(experiment, lr=1e-12, epochs=9, patience=2), tmp_path / "run", quiet=True)
    assert result["epochs"] < 9


def test_nan_is_an_error_that_says_so(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"training loss is (nan|inf).* lower training\.lr"):
        train_classifier(trained(experiment, lr=1e18, epochs=9), tmp_path / "run", quiet=True)


def test_dual_anti_transfer_starts_from_all_weights_of_the_first_half(
    experiment: Experiment, twin: Path, tmp_path: Path
) -> None:
    first = with_twin(experiment, twin, layers=[5])
    train_classifier(first, tmp_path / "first", quiet=True)
    second = trained(first, initial=tmp_path / "first", lr=1e-12, epochs=1)
    train_classifier(second, tmp_path / "second", quiet=True)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.allclose(before[k], after[k], atol=1e-9) for k in before)


def test_dual_anti_transfer_against_two_twins_at_several_layers(
    experiment: Experiment, twin: Path, tmp_path: Path
) -> None:
    words = trained(replace(experiment, task="word-presence"), epochs=1)
    train_classifier(words, tmp_path / "words", quiet=True)
    how = {"layers": [2, 7], "beta": [1.0, 0.5]}
    train_classifier(with_twin(experiment, twin, **how), tmp_path / "first", quiet=True)
    halves = {}
    for name, against in (("again", twin), ("second", tmp_path / "words")):
        half = trained(with_twin(experiment, against, **how), initial=tmp_path / "first", lr=1e-12, epochs=1)
        halves[name] = train_classifier(half, tmp_path / name, quiet=True)["parts"]
    kept = json.loads((tmp_path / "first/result.json").read_text())["parts"]
    for part, scores in kept.items():
        again, second = halves["again"][part], halves["second"][part]
        assert again["similarity_7"] == pytest.approx(scores["similarity_7"], rel=1e-4)
        assert second["similarity_7"] != pytest.approx(scores["similarity_7"], rel=1e-2)
        assert second["cross_entropy"] == pytest.approx(scores["cross_entropy"], rel=1e-4)
        at = second["similarity_2"] + 0.5 * second["similarity_7"]
        assert second["anti_transfer"] == pytest.approx(at, rel=1e-5)
        assert second["total"] == pytest.approx(second["cross_entropy"] + at, rel=1e-5)


@pytest.mark.parametrize("settings", [{"layers": [2, 7]}, {"layers": [2], "loss": GramPosition()}])
def test_a_cached_twin_trains_the_same_network_and_runs_once(
    experiment: Experiment, twin: Path, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the twin runs up to a layer; 25, 7 and 4 samples are trained on, validated, tested."""
    runs: dict[bool, list[int]] = {True: [], False: []}
    features_at = VGG16.features_at
    for cache, ran in runs.items():
        monkeypatch.setattr(
            VGG16, "features_at", lambda net, x, names, ran=ran: ran.append(len(x)) or features_at(net, x, names)
        )
        run = trained(with_twin(experiment, twin, cache=cache, **settings), batch=9)
        train_classifier(run, tmp_path / str(cache), quiet=True)
    assert runs[True] == [9, 9, 9, 9]
    assert sum(runs[False]) == 2 * (25 + 7) + 36
    a, b = (pd.read_csv(tmp_path / str(cache) / "metrics.csv").drop(columns="seconds") for cache in (True, False))
    pd.testing.assert_frame_equal(a, b, rtol=1e-5)
    first, second = weights(tmp_path / "True"), weights(tmp_path / "False")
    assert all(torch.allclose(first[k], second[k], rtol=0, atol=1e-6) for k in first)


def test_the_twin_is_cached_only_where_samples_are_the_same_each_time(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def spying(term: Any, inputs: Any, samples: Any, batch: Any) -> Any:
        asked.append(samples.tolist())
        return {}

    monkeypatch.setattr(AntiTransfer, "remember", spying)
    network = replace(experiment.network, embedding_scale="none")
    words = replace(experiment, task="word", features=replace(experiment.features, cut="word"))
    for name, change, cached in (
        ("frozen", experiment, True),
        ("off", experiment, False),
        ("real", replace(experiment, network=replace(network, domain="real")), True),
        ("trainable", replace(experiment, network=replace(network, rhemo_mode="trainable")), False),
        ("batch", replace(experiment, network=replace(network, rhemo_mode="batch-statistics")), False),
        ("words", replace(words, network=replace(network, domain="real")), False),
    ):
        at = AntiTransferConfig(layers=[1], random_twin=True, cache=name != "off")
        train_classifier(trained(replace(change, anti_transfer=at), epochs=1), tmp_path / name, quiet=True)
        assert bool(asked) == cached, name
        assert not cached or asked.pop() == list(range(36)), name


@pytest.mark.parametrize("loss", [FoldedRowwise(), GramBatch(), CKA(), CosSquared(), MseSigmoid()], ids=repr)
def test_losses_of_whole_batches_take_one_process(
    experiment: Experiment, twin: Path, loss: Loss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=f"anti_transfer.loss {loss.name}, which mixes .* trained by one process only"):
        train_classifier(with_twin(experiment, twin, loss=loss), tmp_path / "run", quiet=True)


def test_what_evaluation_draws_does_not_depend_on_when_a_run_was_interrupted(
    experiment: Experiment, twin: Path, tmp_path: Path
) -> None:
    run = with_twin(experiment, twin, layers=[13], loss=CosSquared("stochastic_pairwise"))
    result = train_classifier(run, tmp_path / "run", quiet=True)
    (tmp_path / "run/result.json").unlink()
    assert train_classifier(run, tmp_path / "run", resume=True, quiet=True)["parts"] == result["parts"]


def test_accuracy_of_batches_is_that_of_consecutive_predictions(experiment: Experiment, tmp_path: Path) -> None:
    result = train_classifier(trained(experiment, accuracy="batches", batch=4), tmp_path / "run", quiet=True)
    predictions = pd.read_csv(tmp_path / "run/predictions.csv")
    again = evaluate_run(tmp_path / "run", device="cpu", quiet=True)
    unequal = 0
    for part, scores in result["parts"].items():
        right = [float(a == b) for a, b in predictions.query("part == @part")[["label", "predicted"]].to_numpy()]
        batches = [right[n : n + 4] for n in range(0, len(right), 4)]
        expected = sum(sum(batch) / len(batch) for batch in batches) / len(batches)
        assert scores["accuracy"] == pytest.approx(expected)
        assert again[part]["accuracy"] == pytest.approx(expected)
        unequal += len(right) % 4 > 0
    assert unequal
    logged = pd.read_csv(tmp_path / "run/metrics.csv")["validation_accuracy"][result["kept_epoch"]]
    assert logged == pytest.approx(result["parts"]["validation"]["accuracy"], abs=1e-6)
    plain = train_classifier(trained(experiment, batch=4), tmp_path / "plain", quiet=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))
    for part, scores in plain["parts"].items():
        assert scores | {"accuracy": result["parts"][part]["accuracy"]} == result["parts"][part]


def test_predictions_of_segments_say_where_they_start(experiment: Experiment, corpus: Manifest, tmp_path: Path) -> None:
    rows = [
        row | {"start": start, "duration": 0.4}
        for row in corpus.table.drop(columns=["checksum", "duration"]).to_dict("records")
        for start in (0.0, 0.5)
    ]
    write_manifest(build_manifest(corpus.root, rows, "halves"), corpus.root / "halves.csv")
    halves = replace(experiment, corpus=CorpusConfig("csv", corpus.root / "halves.csv"))
    train_classifier(trained(halves, epochs=1), tmp_path / "run", quiet=True)
    predictions = pd.read_csv(tmp_path / "run/predictions.csv")
    assert predictions.columns[:5].tolist() == ["part", "path", "cut", "start", "speaker"]
    assert sorted(zip(predictions["path"], predictions["start"], strict=True)) == [
        (row["path"], row["start"]) for row in sorted(rows, key=lambda row: (row["path"], row["start"]))
    ]


def test_a_network_may_have_more_outputs_than_classes(experiment: Experiment, corpus: Manifest, tmp_path: Path) -> None:
    more = replace(experiment, network=replace(experiment.network, outputs=5))
    result = train_classifier(trained(more, epochs=1), tmp_path / "run", quiet=True)
    assert result["classes"] == ["angry", "neutral", "sad", "unused-4", "unused-5"]
    assert weights(tmp_path / "run")["net.classifier.6.bias"].shape == (5,)
    confusion = np.array(result["parts"]["train"]["confusion"])
    assert confusion.shape == (5, 5)
    assert not confusion[3:].any()
    predictions = pd.read_csv(tmp_path / "run/predictions.csv")
    assert {"p_unused-4", "p_unused-5"} < set(predictions.columns)
    path = predictions["path"][0]
    row = predict(tmp_path / "run", [corpus.root / path])[0].iloc[0]
    assert row["unused-5"] == pytest.approx(predictions["p_unused-5"][0], abs=1e-4)
    again = evaluate_run(tmp_path / "run", device="cpu", quiet=True)
    assert again["test"]["confusion"] == result["parts"]["test"]["confusion"]
    follower = with_twin(
        trained(experiment, initial=tmp_path / "run", lr=1e-12, epochs=1), tmp_path / "run", layers=[2]
    )
    assert train_classifier(follower, tmp_path / "three", quiet=True)["classes"] == ["angry", "neutral", "sad"]
    train_classifier(replace(follower, network=more.network), tmp_path / "five", quiet=True)
    before, three, five = (weights(tmp_path / name) for name in ("run", "three", "five"))
    head = ["net.classifier.6.bias", "net.classifier.6.weight"]
    assert [k for k in before if before[k].shape != three[k].shape] == head
    assert all(torch.allclose(before[k], three[k], atol=1e-9) for k in before if k not in head)
    assert all(torch.allclose(before[k], five[k], atol=1e-9) for k in before)
    with pytest.raises(ValueError, match=r"network\.outputs: 2 must be at least 3, the number of classes"):
        train_classifier(
            replace(experiment, network=replace(experiment.network, outputs=2)), tmp_path / "few", quiet=True
        )
    several = replace(more, task="word-presence")
    with pytest.raises(ValueError, match=r"network\.outputs: 5 must be absent with task word-presence"):
        train_classifier(several, tmp_path / "several", quiet=True)


def test_random_twin_is_another_network_and_needs_no_file(experiment: Experiment, twin: Path, tmp_path: Path) -> None:
    control = replace(experiment, anti_transfer=AntiTransferConfig(layers=[13], random_twin=True))
    result = train_classifier(control, tmp_path / "run", quiet=True)
    real = train_classifier(with_twin(experiment, twin, layers=[13]), tmp_path / "real", quiet=True)
    assert 0 < result["parts"]["test"]["similarity_13"] < 1
    assert result["parts"]["test"]["similarity_13"] != real["parts"]["test"]["similarity_13"]


@pytest.mark.parametrize("domain", ["real", "real-on-embedding"])
def test_real_domains_train_too(experiment: Experiment, domain: str, tmp_path: Path) -> None:
    network = replace(experiment.network, domain=domain, embedding_scale="none")
    result = train_classifier(trained(replace(experiment, network=network), epochs=1), tmp_path / "run", quiet=True)
    assert result["parts"]["test"]["samples"] == 4


def test_paper_normalisation_by_domain(experiment: Experiment, tmp_path: Path) -> None:
    rhemo = RHEmoExperiment(
        corpus=experiment.corpus, rhemo=RHEmoConfig(width=0.01), training=experiment.training, cache=experiment.cache
    )
    pretrain_rhemo(rhemo, tmp_path / "rhemo", quiet=True)
    kinds = {}
    for domain in ("quaternion", "real"):
        network = replace(experiment.network, domain=domain, embedding_scale="none", rhemo=tmp_path / "rhemo")
        run = trained(replace(experiment, network=network, normalisation="paper"), epochs=1)
        train_classifier(run, tmp_path / domain, quiet=True)
        kinds[domain] = load_checkpoint(tmp_path / domain, "classifier").record["normalisation"]["kind"]
    assert kinds == {"quaternion": "max", "real": "standard"}


def test_trainable_encoder_is_trained_and_a_frozen_one_is_not(
    experiment: Experiment, rhemo: Path, tmp_path: Path
) -> None:
    before = load_checkpoint(rhemo, "rhemo").part("encoder")
    for mode, moves in (("frozen", False), ("trainable", True)):
        network = replace(experiment.network, rhemo_mode=mode, embedding_scale="none")
        train_classifier(trained(replace(experiment, network=network), epochs=1), tmp_path / mode, quiet=True)
        after = load_checkpoint(tmp_path / mode, "classifier").part("encoder")
        assert torch.equal(before["0.weight"], after["0.weight"]) != moves


def test_word_presence_is_multi_label(experiment: Experiment, tmp_path: Path) -> None:
    result = train_classifier(replace(experiment, task="word-presence"), tmp_path / "run", quiet=True)
    assert result["classes"] == ["one", "say", "three", "two"]
    assert 0 <= result["parts"]["test"]["average_precision"] <= 1


def test_word_network_trains(experiment: Experiment, tmp_path: Path) -> None:
    words = replace(experiment, task="word", features=replace(experiment.features, cut="word"))
    result = train_classifier(words, tmp_path / "run", quiet=True)
    assert result["classes"] == ["one", "three", "two"]


def test_the_order_of_samples_changes_with_the_epoch(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    batches = loop.batches

    def spying(
        examples: Any, order: Any, size: Any, device: Any, generator: torch.Generator = None, shared: Any = (0, 1)
    ) -> Any:
        if generator is not None:
            seen.append(order.tolist())
        return batches(examples, order, size, device, generator, shared)

    monkeypatch.setattr(loop, "batches", spying)
    train_classifier(trained(experiment, epochs=2, batch=25), tmp_path / "run", quiet=True)
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert sorted(seen[0]) == sorted(seen[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AntiTransferConfig(layers=[]), "anti_transfer.layers"),
        (lambda: AntiTransferConfig(layers=[14]), "anti_transfer.layers"),
        (lambda: AntiTransferConfig(layers=[2, 2]), "each once"),
        (lambda: AntiTransferConfig(layers=[2, 7], position="pool5"), "pool5"),
        (lambda: AntiTransferConfig(twin=Path("x"), random_twin=True), "random_twin"),
        (lambda: AntiTransferConfig(beta=float("nan")), "anti_transfer.beta"),
        (lambda: AntiTransferConfig(layers=[2, 7], beta=[1.0, -1.0]), "anti_transfer.beta: .* at least 0"),
        (lambda: AntiTransferConfig(layers=[2, 7], beta=[1.0]), "a list of 2, one for each layer"),
        (lambda: AntiTransferConfig(loss=MseSigmoid("mul_comp"), position="pre-relu"), "anti_transfer.position"),
        (lambda: AntiTransferConfig(cache_mib=-1), "anti_transfer.cache_mib"),
        (lambda: TrainingConfig(batch=0), "training.batch"),
        (lambda: TrainingConfig(epochs=0), "training.epochs"),
        (lambda: TrainingConfig(lr=-1), "training.lr"),
        (lambda: NetworkConfig(width=-1), "network.width"),
        (lambda: NetworkConfig(dropout=2), "network.dropout"),
        (lambda: NetworkConfig(outputs=0), "network.outputs: 0 must be at least 1"),
        (lambda: SplitConfig(leak=2), "split.leak"),
        (lambda: RHEmoConfig(beta=-1), "rhemo.beta"),
        (lambda: from_plain(NetworkConfig, {"width": 1.0, "depth": 3}), "unknown setting depth"),
    ],
)
def test_settings_out_of_range_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_labels_columns_and_networks_are_refused(experiment: Experiment, tmp_path: Path) -> None:
    for change, message in (
        (replace(experiment, corpus=replace(experiment.corpus, where={"sex": ["f"]})), "no column 'sex'"),
        (replace(experiment, corpus=replace(experiment.corpus, where={"speaker": ["eve"]})), "no row is left"),
        (replace(experiment, network=replace(experiment.network, rhemo=None)), "needs a pretrained RH-Emo"),
        (replace(experiment, split=SplitConfig("confounded")), "lists no speaker|is in no part"),
    ):
        with pytest.raises(ValueError, match=message):
            train_classifier(change, tmp_path / "run", quiet=True)


def test_configs_survive_yaml(experiment: Experiment, twin: Path) -> None:
    config = with_twin(experiment, twin, layers=[1, 2], beta=[1.0, 0.5])
    assert from_plain(Experiment, yaml.safe_load(yaml.safe_dump(to_plain(config)))) == config


DDP = """
import json, sys
from pathlib import Path
from qat.config import Experiment, from_plain
from qat.training.classifier import train_classifier
train_classifier(from_plain(Experiment, json.loads(sys.argv[1])), Path(sys.argv[2]), quiet=True)
"""


def test_two_processes_train_like_one_at_the_same_global_batch(
    experiment: Experiment, twin: Path, tmp_path: Path
) -> None:
    """Batch 11 over 25 samples leaves a last batch of 3: two samples for one process, one for the other."""
    few = trained(experiment, epochs=2, lr=1e-4, batch=11, accuracy="batches")
    run = with_twin(few, twin, layers=[2, 7], beta=[1.0, 0.5])
    run = replace(run, network=replace(run.network, dropout=0.0))
    alone = train_classifier(run, tmp_path / "one", quiet=True)
    (tmp_path / "ddp.py").write_text(DDP)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(tmp_path / "ddp.py"), json.dumps(to_plain(run)), str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    both = json.loads((tmp_path / "two/result.json").read_text())
    assert both["processes"] == 2
    a, b = (pd.read_csv(tmp_path / name / "metrics.csv").drop(columns="seconds") for name in ("one", "two"))
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)
    assert alone["parts"]["train"]["total"] == pytest.approx(both["parts"]["train"]["total"], rel=1e-4)
    assert alone["parts"]["train"]["accuracy"] == both["parts"]["train"]["accuracy"]
    pd.testing.assert_series_equal(
        pd.read_csv(tmp_path / "one/predictions.csv")["path"], pd.read_csv(tmp_path / "two/predictions.csv")["path"]
    )
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[k], two[k], atol=2e-5) for k in one)
