"""Commands that train one network: ``qat pretrain`` and ``qat train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from qat.commands.parser import Commands, Parser, instance
from qat.config import Experiment, RHEmoExperiment, SpectrogramConfig, TrainingConfig, to_plain


def add_pretrain(commands: Commands) -> None:
    group = commands.group("pretrain", "Train RH-Emo and the networks of the orthogonal tasks.")
    parser = group.add(
        "rhemo",
        run_pretrain_rhemo,
        "Train one stage of RH-Emo. The defaults are stage 1 (reconstruction). Stage 2 (with emotions): "
        "--training.initial STAGE1 --rhemo.beta 0.01 --training.lr 1e-6 --training.batch 20 --training.patience 30 "
        "--training.weight_decay 1e-5",
    )
    _add_training_arguments(parser, RHEmoExperiment())
    orthogonal = TrainingConfig(lr=5e-5, batch=300, epochs=500)
    for task, defaults in (
        ("words", Experiment(task="word", features=SpectrogramConfig(cut="word"), training=orthogonal)),
        ("speakers", Experiment(task="speaker", training=orthogonal)),
    ):
        parser = group.add(task, run_train, f"Train a network that recognises {task}.")
        _add_training_arguments(parser, defaults)


def run_pretrain_rhemo(options: Namespace) -> Any:
    from qat.training.rhemo import pretrain_rhemo

    experiment = instance(RHEmoExperiment, options)
    return pretrain_rhemo(experiment, options.out, resume=options.resume, profile=options.profile)


def add_train(commands: Commands) -> None:
    parser = commands.add("train", run_train, "Train an emotion classifier, with or without anti-transfer.")
    _add_training_arguments(parser, Experiment())


def run_train(options: Namespace) -> Any:
    from qat.training.classifier import train_classifier

    experiment = instance(Experiment, options)
    return train_classifier(experiment, options.out, resume=options.resume, profile=options.profile)


def _add_training_arguments(parser: Parser, defaults: Experiment | RHEmoExperiment) -> None:
    parser.add_argument("--config", action="config", help="YAML file of settings; options after it take precedence")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run of the same settings")
    parser.add_argument("--profile", action="store_true", help="profile some steps: profile.txt and Chrome traces")
    parser.add_class_arguments(type(defaults))
    parser.set_defaults({name: value for name, value in to_plain(defaults).items() if name != "corpus"})
