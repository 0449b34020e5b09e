"""Commands that train one network: ``qat pretrain`` and ``qat train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from qat.commands.corpus import add_strict
from qat.commands.parser import Commands, Parser, instance
from qat.config import CorpusConfig, Experiment, RHEmoExperiment, flatten, to_plain
from qat.config.preset import NAMES, SPLITS, Plain, kind_of, read_overrides, settings_of


class TrainingParser(Parser):
    """A parser of one training's settings, whose defaults are those of ``--preset`` if there is one."""

    stage: str

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None, **options: Any) -> Namespace:  # type: ignore[override]
        """Parse twice: which settings of a preset are meant depends on the other options."""
        own = super().parse_args(args, defaults=False, _skip_validation=True)
        settings = flatten(to_plain(kind_of(self.stage)()))
        try:
            if own.get("preset") is not None:
                settings |= flatten(preset_settings(self.stage, own.preset, own))
            elif self.stage in ("word", "speaker"):  # which have no defaults of their own
                paper = preset_settings(self.stage, "paper", own)
                settings |= flatten({name: paper[name] for name in ("task", "features", "training") if name in paper})
        except ValueError as error:
            self.error(str(error))
        self.set_defaults(settings)
        return super().parse_args(args, namespace, **options)


def preset_settings(stage: str, preset: str, own: Namespace) -> Plain:
    """The settings of a preset, nested, for a training that the user has described in part.

    Args:
        stage: stage of the training; ``rhemo`` is stage 2 where it starts from another checkpoint.
        preset: name or file of the preset.
        own: options that were named. Of anti-transfer only its presence counts: no preset tells speakers from words.
    """
    corpus, initial = own.get("corpus.name"), own.get("training.initial")
    attributes: dict[str, Any] = {}
    if stage == "rhemo":
        stage = "rhemo-2" if initial else "rhemo-1"
    else:
        attributes["network"] = own.get("network.domain", "quaternion")
    if stage == "emotion":
        attributes |= {"corpus": corpus or CorpusConfig().name}
        rule = own.get("split.rule")
        attributes |= {"split": next((split for split, rules in SPLITS.items() if rule in rules), "random")}
        transfers = own.get("anti_transfer.twin") or own.get("anti_transfer.random_twin")
        attributes |= {"at": ("dual_SW" if initial else "single_S") if transfers else "none"}
        attributes |= {"layer": own.get("anti_transfer.layers", [2])[0] if transfers else 0}
    settings = settings_of(stage, attributes, read_overrides(preset))
    if corpus not in (None, settings["corpus"]["name"]):
        settings["corpus"] = {"name": corpus}  # another corpus has other speakers
    settings["corpus"].setdefault("folder", str(Path("corpora") / settings["corpus"]["name"]))
    return settings


def add_pretrain(commands: Commands) -> None:
    group = commands.group("pretrain", "Train RH-Emo and the networks of the orthogonal tasks.")
    text = "Train RH-Emo: stage 1 (reconstruction), or with --preset and --training.initial STAGE1 stage 2 (emotions)."
    group.add("rhemo", run_pretrain_rhemo, text, _training_parser("rhemo", text))
    for task in ("word", "speaker"):
        text = f"Train a network that recognises {task}s."
        group.add(f"{task}s", run_train, text, _training_parser(task, text))


def run_pretrain_rhemo(options: Namespace) -> Any:
    from qat.training.rhemo import pretrain_rhemo

    experiment = instance(RHEmoExperiment, options)
    return pretrain_rhemo(experiment, options.out, **_course(options))


def add_train(commands: Commands) -> None:
    text = "Train an emotion classifier, with or without anti-transfer."
    commands.add("train", run_train, text, _training_parser("emotion", text))


def run_train(options: Namespace) -> Any:
    from qat.training.classifier import train_classifier

    experiment = instance(Experiment, options)
    return train_classifier(experiment, options.out, **_course(options))


def _course(options: Namespace) -> dict[str, Any]:
    return {name: options[name] for name in ("resume", "profile", "strict")}


def _training_parser(stage: str, text: str) -> TrainingParser:
    parser = TrainingParser(description=text)
    parser.stage = stage
    names = ", ".join(NAMES)
    parser.add_argument("--config", action="config", help="YAML file of settings; options after it take precedence")
    parser.add_argument(
        "--preset",
        type=str | None,
        default=None,
        help=f"{names} or a file of overrides; all other settings win over it",
    )
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    help_ = "continue an interrupted run of the same settings, or with a lower --training.lr"
    parser.add_argument("--resume", action="store_true", help=help_)
    parser.add_argument("--profile", action="store_true", help="profile some steps: profile.txt and Chrome traces")
    add_strict(parser)
    parser.add_class_arguments(kind_of(stage))
    return parser
