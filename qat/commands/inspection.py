"""Commands that look at what is there: ``qat evaluate``, ``qat predict``, ``qat report`` and ``qat doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from qat.commands.corpus import add_strict
from qat.commands.parser import Commands
from qat.config import CorpusConfig


def add_evaluate(commands: Commands) -> None:
    text = "Evaluate a trained classifier on its own parts or on another corpus."
    parser = commands.add("evaluate", run_evaluate, text)
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    corpus = "another corpus with the same labels: --corpus.name csv --corpus.folder my.csv"
    parser.add_argument("--corpus", type=CorpusConfig | None, default=None, help=corpus)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1...")


def run_evaluate(options: Namespace) -> Any:
    from qat.training.inference import evaluate_run

    return {"parts": evaluate_run(options.run, options.corpus, device=options.device)}


def add_predict(commands: Commands) -> None:
    parser = commands.add("predict", run_predict, "Classify audio files.")
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("files", type=Path, nargs="+", help="wav, flac, mp3, ogg or opus")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1...")
    add_strict(parser)


def run_predict(options: Namespace) -> Any:
    from qat.training.inference import predict

    predictions, problems = predict(options.run, options.files, device=options.device, strict=options.strict)
    return {"predictions": predictions.to_dict("records"), "problems": problems.to_dict("records")}


def add_report(commands: Commands) -> None:
    text = "Write a table and an HTML page from finished runs, or from those of a grid."
    parser = commands.add("report", run_report, text)
    parser.add_argument("folder", type=Path, help="folder that holds runs, at any depth")
    parser.add_argument("--out", type=Path | None, default=None, help="HTML file (default: report.html in the folder)")


def run_report(options: Namespace) -> Any:
    from qat.report.report import report_and_tables

    return report_and_tables(options.folder, options.out, short=not options.json)


def add_doctor(commands: Commands) -> None:
    commands.add("doctor", run_doctor, "Check which parts are installed and work on this machine.")


def run_doctor(options: Namespace) -> Any:
    from qat.doctor import examine

    return examine()
