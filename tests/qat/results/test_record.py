"""Records of finished trainings: what is read back is what was written, with its version."""

import json
from pathlib import Path

import pytest

from qat.config import AntiTransferConfig, Experiment, RHEmoExperiment, to_plain
from qat.results.record import SCHEMA, Analysis, Probes, Scores, origin, read_analysis, read_result


def test_a_result_is_read_back_typed(tmp_path: Path) -> None:
    experiment = Experiment(anti_transfer=AntiTransferConfig(layers=[2, 7], beta=[1.0, 0.5]))
    scores = {"accuracy": 0.5, "samples": 4, "confusion": [[1, 1], [1, 1]], "total": 1.5, "similarity_2": float("nan")}
    plain = {
        "kind": "classifier",
        "seed": 3,
        "experiment": to_plain(experiment),
        "parts": {"test": scores},
        "epochs": 7.0,
    }
    file = tmp_path / "result.json"
    file.write_text(json.dumps(plain | origin()))
    result = read_result(file)
    assert (result.experiment, result.seed, result.epochs, result.kept_epoch) == (experiment, 3, 7, None)
    losses = {"total": 1.5, "similarity_2": None}
    assert result.parts == {"test": Scores(0.5, samples=4, confusion=[[1, 1], [1, 1]], losses=losses)}
    assert result.command == origin()["command"]


def test_files_without_a_version_are_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text('{"kind": "rhemo"}')
    assert read_result(file).experiment == RHEmoExperiment()
    file.write_text(json.dumps({"kind": "rhemo", "schema": SCHEMA}))
    assert read_result(file).experiment == RHEmoExperiment()
    file.write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(
        ValueError, match=f"schema {SCHEMA + 1} must be {SCHEMA}; another version of qat wrote this file"
    ):
        read_result(file)


def test_an_analysis_is_read_back(tmp_path: Path) -> None:
    analysis = Analysis(0.5, 0.25, 0.1, 0.2, None, {2: Probes(0.75, 0.5), 13: Probes(0.5, 0.25)})
    (tmp_path / "analysis.json").write_text(json.dumps(to_plain(analysis)))
    assert read_analysis(tmp_path / "analysis.json") == analysis
    assert read_analysis(tmp_path / "nothing.json") == Analysis()
