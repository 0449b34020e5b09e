"""Commands that train more than one network (``demo``, ``study``, ``sweep``, ``grid``), and ``preset``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from qat.campaign.options import Assumed, Layout, Selection, SlurmConfig
from qat.commands.parser import Commands, instance
from qat.config import to_plain
from qat.config.preset import NAMES, VALUES, check_values

if TYPE_CHECKING:
    from qat.campaign.plan import Campaign

PRESETS = f"{', '.join(NAMES)}, or a file of the same form"

HOURS = (
    "estimated, not measured: what is left to train, one after another on one device, by counting multiplications; "
    "epochs and tflops (1e12 operations a second) are assumed or taken from finished trainings, as `basis` says"
)


def add_demo(commands: Commands) -> None:
    _add_study(commands, "demo", "The whole method on a small corpus, from recordings to a report.")


def add_study(commands: Commands) -> None:
    text = (
        "Does anti-transfer help, where and why: many settings and seeds on a small corpus, in hours on two cores. The "
        "same command continues where it stopped."
    )
    _add_study(commands, "study", text)


def _add_study(commands: Commands, design: str, text: str) -> None:
    parser = commands.add(design, run_study, text)
    add = parser.add_argument
    add("--design", type=str, default=design, help="study, demo, or a YAML file like those in qat/campaign/designs")
    speech = "synthetic (made on the spot), recorded (290 MB from Debian's archive), or a YAML file like theirs"
    add("--speech", type=str, default="synthetic", help=speech)
    add("--from", type=Path | None, default=None, help="folder of Debian packages that were downloaded before")
    add("--out", type=Path | None, default=None, help="folder for everything (default: runs/DESIGN-SPEECH)")
    add("--preset", type=str | None, default=None, help=f"instead of the speech's: {PRESETS}")
    add("--layers", type=list[int] | None, default=None, help="layers instead of the design's")
    add("--real", type=bool | None, default=None, help="whether the real network takes part")
    add("--brief", action="store_true", help="only the entries that the design calls brief, about half of `study`")
    _add_settings_arguments(parser, "DIR/corpora/NAME")
    _add_engine_arguments(parser, at_once=2, cluster="local")


def run_study(options: Namespace) -> Any:
    from qat.campaign.study import obtain, plan_study, read_design, read_speech

    design, speech, seeds = read_design(options.design), read_speech(options.speech), _seeds(options)
    real = design.real if options.real is None else options.real
    brief = options.brief or design.brief
    design = replace(design, layers=options.layers or design.layers, real=real, brief=brief)
    folder = options.out or Path("runs") / f"{Path(options.design).stem}-{Path(options.speech).stem}"
    campaign = plan_study(folder, design, speech, options.preset, seeds, options.folders, options.settings)
    about = {
        "design": options.design,
        "preset": options.preset or speech.preset,
        "selection": {"layers": design.layers, "real": real, "brief": brief},
        "speech": options.speech,
        "about": speech.about,
        "not_run": design.remarks(),
    }
    moments = [time.monotonic()]

    def prepare() -> None:
        obtain(campaign, options["from"])
        moments.append(time.monotonic())

    result = _train(options, campaign, about, prepare)
    if options.dry_run or not campaign.finished():
        return result
    from qat.report.report import report_and_tables

    moments.append(time.monotonic())
    tables = report_and_tables(folder, short=not options.json)
    moments.append(time.monotonic())
    took = [round(after - before) for before, after in itertools.pairwise(moments)]
    parts = [{"part": part, "seconds": seconds} for part, seconds in zip(_PARTS, took, strict=True)]
    own = [{"part": f"- {run['training']}", "seconds": run["seconds"]} for run in result["runs"] if run["seconds"]]
    return {**tables, "time": [*parts[:2], *own, parts[2]], "problems": result["problems"]}


_PARTS = ("speech", "trainings, side by side", "report")


def add_sweep(commands: Commands) -> None:
    text = (
        "Train every combination of what varies in a plan: `base` has the settings of `qat train`, `vary` a list of "
        "values for each dotted setting, e.g. `training.seed: [1, 2]`. Each run has its own process and folder; one "
        "that fails ends no other."
    )
    parser = commands.add("sweep", run_sweep, text)
    parser.add_argument("plan", type=Path, help="YAML file of settings and of what varies")
    parser.add_argument("--out", type=Path, required=True, help="folder for all runs; run again to continue them")
    _add_engine_arguments(parser)


def run_sweep(options: Namespace) -> Any:
    from qat.campaign.sweep import plan_sweep

    campaign = plan_sweep(options.out, options.plan, _seeds(options))
    return _train(options, campaign, {"design": str(options.plan)})


def add_grid(commands: Commands) -> None:
    text = (
        "Train the paper's grid, or a part of it: RH-Emo, the networks of words and speakers, then for each corpus, "
        "split and network one without anti-transfer and one for each kind of it and layer. What is finished is never "
        "trained again."
    )
    parser = commands.add("grid", run_grid, text)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything; run again to continue")
    parser.add_argument("--preset", type=str, default="paper", help=PRESETS)
    parser.add_class_arguments(Selection)
    _add_settings_arguments(parser, "corpora/NAME")
    _add_engine_arguments(parser)


def run_grid(options: Namespace) -> Any:
    from qat.campaign.grid import plan_grid
    from qat.campaign.plan import no_folder

    selection, seeds = instance(Selection, options), _seeds(options) or [1]
    campaign = plan_grid(options.out, options.preset, selection, seeds, options.folders, options.settings)

    def check_corpora() -> None:
        if missing := campaign.missing_corpora():
            raise no_folder(missing)

    about = {"design": "grid", "preset": options.preset, "selection": to_plain(selection)}
    return _train(options, campaign, about, check_corpora)


def _add_settings_arguments(parser: ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--settings", type=Path | None, default=None, help="file of overrides, applied after the preset's"
    )
    parser.add_argument("--folders", type=dict[str, Path], default={}, help=f"folders of corpora (default: {default})")


def _add_engine_arguments(parser: ArgumentParser, at_once: int = 1, cluster: str = "auto") -> None:
    """The arguments of every command of many trainings."""
    add = parser.add_argument
    seeds = "seeds of the emotion trainings: how many, or a list (default: the design's, or 1)"
    add("--seeds", type=int | list[int] | None, default=None, help=seeds)
    many = "trainings side by side in each job; one CPU thread each if many"
    add("--at-once", type=int, default=at_once, help=many)
    jobs = "jobs that share the runs (default: one for each visible GPU, or one)"
    add("--jobs", type=int | None, default=None, help=jobs)
    where = "this machine, or a job array of Slurm; auto is slurm where there is an sbatch"
    add("--cluster", choices=["auto", "local", "slurm"], default=cluster, help=where)
    parser.add_class_arguments(SlurmConfig, "slurm")
    add("--dry-run", action="store_true", help="only list the trainings, and estimate their cost")
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


def _train(options: Namespace, campaign: Campaign, about: Mapping[str, Any], prepare: Any = None) -> dict[str, Any]:
    """Train a campaign, or list its trainings with ``--dry-run``.

    Args:
        options: options of :func:`_add_engine_arguments`.
        campaign: campaign.
        about: its part of ``campaign.yaml``, before the options that all designs share.
        prepare: called before anything is trained.
    """
    from qat.campaign.cost import estimate
    from qat.campaign.jobs import train

    layout = Layout(options.at_once, options.jobs, options.cluster, options.slurm)
    total = {"trainings": len(campaign.trainings), "finished": len(campaign.finished())}
    if options.dry_run:
        stages = estimate(campaign, options.assumed)
        hours = {"hours": round(float(stages["hours"].sum()), 2), "note": HOURS}
        table = campaign.table if options.json else campaign.table[["name", "seed", "run"]]
        shown = {"runs": table.to_dict("records")} if options.json or len(table) <= 50 else {}
        return total | shown | {"stages": stages.to_dict("records")} | hours | {"problems": []}
    if prepare is not None:
        prepare()
    common = {name: options[name] for name in ("seeds", "folders") if name in options}
    settings = options.get("settings")
    campaign.write({**about, **common, "settings": settings.read_text(encoding="utf-8") if settings else None})
    outcomes, labels = train(campaign, layout), campaign.labels
    names = {one.path: {"training": labels[one.path], "run": one.path.as_posix()} for one in outcomes}
    runs = [
        names[one.path]
        | {"status": one.status, "epochs": one.result and one.result["epochs"]}
        | {"accuracy": one.result and one.result["parts"]["test"].get("accuracy")}
        | {"seconds": one.result and round(one.result["seconds"])}
        for one in outcomes
    ]
    return total | {
        "finished": sum(one.status == "finished" for one in outcomes),
        "folder": options.out or campaign.folder,
        "runs": runs,
        "problems": [names[one.path] | {"problem": one.error} for one in outcomes if one.error],
    }


def add_preset(commands: Commands) -> None:
    text = (
        "Print a preset's settings of one training, for `qat train --config FILE` (or `qat pretrain ...`): the paper's "
        "reading of what paper and released code disagree on, the code's, or what learns in minutes."
    )
    parser = commands.add("preset", run_preset, text)
    parser.add_argument("name", type=str, help=PRESETS)
    parser.add_argument("--stage", choices=[*VALUES["stage"]], default="emotion")
    parser.add_argument("--network", choices=[*VALUES["network"]], default="quaternion", help="not in RH-Emo's stages")
    parser.add_argument("--corpus", type=str, default="iemocap", help="this and what follows: of emotion trainings")
    parser.add_argument("--split", choices=[*VALUES["split"]], default="random")
    parser.add_argument(
        "--at", choices=[*VALUES["at"]], default="none", help="anti-transfer against (S)peakers, (W)ords"
    )
    parser.add_argument("--layer", choices=[*VALUES["layer"]][1:], type=int, default=2, help="layer of anti-transfer")


def run_preset(options: Namespace) -> Any:
    import yaml

    from qat.config.preset import experiment, read_overrides, settings_of
    from qat.data.corpora import EMOTION

    check_values("--corpus", [options.corpus], EMOTION)
    place = {} if options.stage.startswith("rhemo") else {"network": options.network}
    if options.stage == "emotion":
        place |= {name: options[name] for name in ("corpus", "split", "at")}
        place["layer"] = 0 if options.at == "none" else options.layer
    # Whole, because other commands have other defaults; but for the folder, which is the user's to say.
    whole = to_plain(experiment(settings_of(options.stage, place, read_overrides(options.name)), options.stage))
    del whole["corpus"]["folder"]
    if place.get("layer"):
        whole["anti_transfer"]["layers"] = [place["layer"]]
    return whole if options.json else yaml.safe_dump(whole, sort_keys=False)
