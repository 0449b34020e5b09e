"""Commands that train more than one network (``demo``, ``study``, ``sweep``, ``grid``), and ``preset``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from qat.campaign.cost import Assumed
from qat.campaign.grid import Selection
from qat.campaign.jobs import SlurmConfig
from qat.commands.parser import Commands, instance
from qat.config import to_plain
from qat.config.preset import NAMES, VALUES
from qat.data.corpora import EMOTION

if TYPE_CHECKING:
    from qat.campaign.plan import Campaign

PRESETS = f"{', '.join(NAMES)}, or a file of the same form"

HOURS = (
    "estimated, not measured: what is left to train, one after another on one device, by counting multiplications; "
    "epochs and tflops (1e12 operations a second) are assumed or taken from finished trainings, as `basis` says"
)


def add_demo(commands: Commands) -> None:
    """``qat demo``."""
    parser = commands.add("demo", run_demo, "The whole method on a small corpus, from recordings to a report.")
    _add_study_arguments(parser)


def run_demo(options: Namespace) -> Any:
    from qat.campaign.study import read_design

    return _run_study(options, "demo", read_design("demo"))


def add_study(commands: Commands) -> None:
    """``qat study``."""
    parser = commands.add(
        "study",
        run_study,
        "Does anti-transfer help, where and why: many settings and seeds on a small corpus, in hours on two cores. The "
        "same command goes on where it was stopped.",
    )
    parser.add_argument(
        "--design", type=str, default="study", help="study, demo, or a YAML file like those in qat/campaign/designs"
    )
    _add_study_arguments(parser)
    parser.add_argument("--layers", type=list[int] | None, default=None, help="layers instead of the design's")
    parser.add_argument("--real", type=bool | None, default=None, help="whether the real network takes part")
    parser.add_argument("--brief", action="store_true", help="only what the design calls brief, about half")


def run_study(options: Namespace) -> Any:
    from qat.campaign.study import read_design

    chosen = {name: options[name] for name in ("layers", "real") if options[name] is not None}
    design = replace(read_design(options.design), **chosen)
    return _run_study(options, options.design, replace(design, short=options.brief or design.short))


def _add_study_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--speech",
        type=str,
        default="synthetic",
        help="synthetic (made on the spot), recorded (290 MB from Debian's archive), or a YAML file like theirs",
    )
    parser.add_argument("--from", type=Path | None, default=None, help="folder of Debian packages downloaded already")
    parser.add_argument(
        "--out", type=Path | None, default=None, help="folder for everything (default: runs/DESIGN-SPEECH)"
    )
    parser.add_argument("--preset", type=str | None, default=None, help=f"instead of the speech's: {PRESETS}")
    _add_settings_arguments(parser, "DIR/corpora/NAME")
    _add_engine_arguments(parser, at_once=2, cluster="local")


def _run_study(options: Namespace, name: str, design: Any) -> Any:
    from qat.campaign.study import obtain, plan_study, read_speech

    speech, seeds = read_speech(options.speech), _seeds(options)
    folder = options.out or Path("runs") / f"{Path(name).stem}-{Path(options.speech).stem}"
    campaign = plan_study(folder, design, speech, options.preset, seeds, options.folders, options.settings)
    asked = {
        "design": name,
        "preset": options.preset or speech.preset,
        "selection": {"layers": design.layers, "real": design.real, "brief": design.short},
        "speech": options.speech,
        "about": speech.about,
        "not_run": design.remarks(),
    }
    result = _carry_out(options, campaign, asked, lambda: obtain(campaign, options["from"]))
    if options.dry_run or not campaign.finished():
        return result
    from qat.report.report import report_and_tables

    return {**report_and_tables(folder, short=not options.json), "problems": result["problems"]}


def add_sweep(commands: Commands) -> None:
    """``qat sweep``."""
    parser = commands.add(
        "sweep",
        run_sweep,
        "Train every combination of what varies in a plan: `base` has the settings of `qat train`, `vary` a list of "
        "values for each dotted setting, e.g. `training.seed: [1, 2]`. Each run has its own process and folder; one "
        "that fails ends no other.",
    )
    parser.add_argument("plan", type=Path, help="YAML file of settings and of what varies")
    parser.add_argument("--out", type=Path, required=True, help="folder for all runs; the same again goes on with them")
    _add_engine_arguments(parser)


def run_sweep(options: Namespace) -> Any:
    from qat.campaign.sweep import plan_sweep

    campaign = plan_sweep(options.out, options.plan, _seeds(options))
    return _carry_out(options, campaign, {"design": str(options.plan)})


def add_grid(commands: Commands) -> None:
    """``qat grid``."""
    parser = commands.add(
        "grid",
        run_grid,
        "Train the paper's grid, or a part of it: RH-Emo, the networks of words and speakers, then for each corpus, "
        "split and network one without anti-transfer and one for each kind of it and layer. What is finished is never "
        "trained again.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; the same again goes on with it")
    parser.add_argument("--preset", type=str, default="paper", help=PRESETS)
    parser.add_class_arguments(Selection)
    _add_settings_arguments(parser, "corpora/NAME")
    _add_engine_arguments(parser)


def run_grid(options: Namespace) -> Any:
    from qat.campaign.grid import plan_grid

    selection = instance(Selection, options)
    seeds = _seeds(options) or [1]
    campaign = plan_grid(options.out, options.preset, selection, seeds, options.folders, options.settings)

    def refuse() -> None:
        if missing := campaign.missing_corpora():
            text = "{0}: no folder {1}; name it with --folders '{{{0}: DIR}}'"
            raise ValueError("; ".join(text.format(*item) for item in missing.items()))

    asked = {"design": "grid", "preset": options.preset, "selection": to_plain(selection)}
    return _carry_out(options, campaign, asked, refuse)


def _add_settings_arguments(parser: ArgumentParser, default: str) -> None:
    parser.add_argument("--settings", type=Path | None, default=None, help="file of layers that lie over the preset's")
    parser.add_argument("--folders", type=dict[str, Path], default={}, help=f"folders of corpora (default: {default})")


def _add_engine_arguments(parser: ArgumentParser, at_once: int = 1, cluster: str = "auto") -> None:
    """What all commands of many trainings have in common."""
    parser.add_argument(
        "--seeds",
        type=int | list[int] | None,
        default=None,
        help="seeds of the emotion trainings: how many, or a list (default: the design's, or 1)",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=at_once,
        help="trainings side by side in each job; one CPU thread each if many",
    )
    parser.add_argument(
        "--jobs",
        type=int | None,
        default=None,
        help="jobs that share the runs (default: one for each visible GPU, or one)",
    )
    parser.add_argument(
        "--cluster",
        choices=["auto", "local", "slurm"],
        default=cluster,
        help="this machine, or a job array of Slurm; auto is slurm where there is an sbatch",
    )
    parser.add_class_arguments(SlurmConfig, "slurm")
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be trained, and what it may cost")
    parser.add_class_arguments(Assumed, "assumed")


def _seeds(options: Namespace) -> list[int] | None:
    seeds = options.seeds
    if isinstance(seeds, int):
        if seeds < 1:
            raise ValueError(f"--seeds {seeds} must be at least 1, or a list")
        return list(range(1, seeds + 1))
    if seeds is not None and (not seeds or len(set(seeds)) < len(seeds)):
        raise ValueError(f"--seeds {seeds} must be one or more, each once")
    chosen: list[int] | None = seeds
    return chosen


def _carry_out(options: Namespace, campaign: Campaign, asked: Mapping[str, Any], prepare: Any = None) -> dict[str, Any]:
    """Train a campaign, or tell what would be trained.

    Args:
        options: options of :func:`_add_engine_arguments`.
        campaign: campaign.
        asked: what ``campaign.yaml`` says before the settings that all designs share.
        prepare: called before anything is trained.
    """
    from qat.campaign.cost import estimate
    from qat.campaign.jobs import Layout, train

    layout = Layout(options.at_once, options.jobs, options.cluster, options.slurm)
    total = {"trainings": len(campaign.trainings), "finished": len(campaign.finished())}
    if options.dry_run:
        stages = estimate(campaign, options.assumed)
        hours = {"hours": round(float(stages["hours"].sum()), 2), "note": HOURS}
        runs = campaign.table if options.json else campaign.table[["name", "seed", "run"]]
        shown = {"runs": runs.to_dict("records")} if options.json or len(runs) <= 50 else {}
        return total | shown | {"stages": stages.to_dict("records")} | hours | {"problems": []}
    if prepare is not None:
        prepare()
    common = {name: options[name] for name in ("seeds", "folders") if name in options}
    settings = options.get("settings")
    common["settings"] = settings.read_text(encoding="utf-8") if settings else None
    campaign.write(dict(asked) | common)
    outcomes = train(campaign, layout)
    seeds = dict(zip(campaign.table["run"], campaign.table["seed"], strict=True))

    def named(outcome: Any) -> dict[str, Any]:
        seed = seeds[outcome.path.name]
        name = campaign.names[outcome.path]
        return {"training": name if seed is None else f"{name}, seed {seed}", "run": outcome.path.as_posix()}

    return total | {
        "finished": sum(one.status == "finished" for one in outcomes),
        "folder": options.out or campaign.folder,
        "runs": [
            {
                **named(one),
                "status": one.status,
                "epochs": one.result and one.result["epochs"],
                "accuracy": one.result and one.result["parts"]["test"].get("accuracy"),
            }
            for one in outcomes
        ],
        "problems": [named(one) | {"problem": one.error} for one in outcomes if one.error],
    }


def add_preset(commands: Commands) -> None:
    """``qat preset``."""
    parser = commands.add(
        "preset",
        run_preset,
        "Print a preset's settings of one training, for `qat train --config FILE` (or `qat pretrain ...`): the paper's "
        "reading of what paper and released code disagree on, the code's, or what learns in minutes.",
    )
    parser.add_argument("name", type=str, help=PRESETS)
    parser.add_argument("--stage", choices=[*VALUES["stage"]], default="emotion")
    parser.add_argument("--network", choices=[*VALUES["network"]], default="quaternion", help="not in RH-Emo's stages")
    parser.add_argument("--corpus", choices=[*EMOTION], default="iemocap", help="this and what follows: of emotion")
    parser.add_argument("--split", choices=[*VALUES["split"]], default="random")
    parser.add_argument(
        "--at", choices=[*VALUES["at"]], default="none", help="anti-transfer against (S)peakers, (W)ords"
    )
    parser.add_argument("--layer", choices=[*VALUES["layer"]][1:], type=int, default=2, help="layer of anti-transfer")


def run_preset(options: Namespace) -> Any:
    import yaml

    from qat.config.preset import experiment, read_layers, settings_of

    place = {} if options.stage.startswith("rhemo") else {"network": options.network}
    if options.stage == "emotion":
        place |= {name: options[name] for name in ("corpus", "split", "at")}
        place["layer"] = 0 if options.at == "none" else options.layer
    # Whole, because other commands have other defaults; but for the folder, which is the user's to say.
    whole = to_plain(experiment(settings_of(options.stage, place, read_layers(options.name)), options.stage))
    del whole["corpus"]["folder"]
    if place.get("layer"):
        whole["anti_transfer"]["layers"] = [place["layer"]]
    return whole if options.json else yaml.safe_dump(whole, sort_keys=False)
