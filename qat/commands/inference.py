"""Commands that use a trained classifier: ``qat evaluate`` and ``qat predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from qat.commands.parser import Commands
from qat.config import CorpusConfig


def add_evaluate(commands: Commands) -> None:
    parser = commands.add(
        "evaluate", run_evaluate, "Evaluate a trained classifier on its own parts or on another corpus."
    )
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument(
        "--corpus",
        type=CorpusConfig | None,
        default=None,
        help="another corpus with the same labels: --corpus.name csv --corpus.folder my.csv",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1...")


def run_evaluate(options: Namespace) -> Any:
    from qat.training.inference import evaluate_run

    return {"parts": evaluate_run(options.run, options.corpus, device=options.device)}


def add_predict(commands: Commands) -> None:
    parser = commands.add("predict", run_predict, "Classify audio files.")
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("files", type=Path, nargs="+", help="wav, flac, mp3, ogg or opus")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1...")


def run_predict(options: Namespace) -> Any:
    from qat.training.inference import predict

    return predict(options.run, options.files, device=options.device).to_dict("records")
