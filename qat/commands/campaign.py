"""Commands that train more than one network (``demo``, ``study``, ``sweep``, ``grid``), and ``preset``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from qat.campaign.cost import Assumed
from qat.campaign.grid import CORPORA, Selection
from qat.campaign.sweep import SlurmConfig
from qat.commands.parser import Commands, instance
from qat.config import to_plain
from qat.config.preset import VALUES


def add_demo(commands: Commands) -> None:
    """``qat demo``."""
    parser = commands.add("demo", run_demo, "The whole method on a small corpus, from recordings to a report.")
    _add_study_arguments(parser, "demo", seeds=1)
    parser.add_argument(
        "--recipe", choices=["small", "paper"], default="small", help="what learns here, or the paper's"
    )


def run_demo(options: Namespace) -> Any:
    from qat.campaign.study import Study

    return _studied(Study(*_material(options, "demo"), options.recipe, _seeds(options), options.workers))


def add_study(commands: Commands) -> None:
    """``qat study``."""
    parser = commands.add(
        "study",
        run_study,
        "Does anti-transfer help, where and why: many settings and seeds on a small corpus, in hours on two cores. The "
        "same command goes on where it was stopped.",
    )
    _add_study_arguments(parser, "study", seeds=5)
    parser.add_argument("--layers", type=list[int], default=[2, 7, 13], help="of the quaternion network")
    parser.add_argument("--real", type=bool, default=True, help="also the real network")
    parser.add_argument("--brief", action="store_true", help="about half of the settings")


def run_study(options: Namespace) -> Any:
    from qat.campaign.inquiry import Inquiry

    folder, material = _material(options, "study")
    chosen = {"layers": tuple(options.layers), "real": options.real, "brief": options.brief}
    return _studied(Inquiry(folder, material, seeds=_seeds(options), workers=options.workers, **chosen))


def _add_study_arguments(parser: ArgumentParser, name: str, seeds: int) -> None:
    parser.add_argument(
        "--speech",
        choices=["synthetic", "recorded"],
        default="synthetic",
        help="synthesised on the spot, or human speech (290 MB) from Debian's archive",
    )
    parser.add_argument("--from", type=Path | None, default=None, help="folder of Debian packages downloaded already")
    parser.add_argument(
        "--out", type=Path | None, default=None, help=f"folder for everything (default: runs/{name}-SPEECH)"
    )
    parser.add_argument("--seeds", type=int, default=seeds, help="repeat every emotion training with so many seeds")
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, one thread each")


def _material(options: Namespace, name: str) -> tuple[Path, Any]:
    from qat.campaign.study import recorded, synthetic

    if options.seeds < 1 or options.workers < 1:
        raise ValueError(f"--seeds {options.seeds} and --workers {options.workers} must be at least 1")
    folder = options.out or Path("runs") / f"{name}-{options.speech}"
    if options.speech == "synthetic":
        return folder, synthetic(folder / "corpus", options.workers)
    return folder, recorded(folder / "corpora", options["from"])


def _seeds(options: Namespace) -> tuple[int, ...]:
    return tuple(range(1, options.seeds + 1))


def _studied(study: Any) -> Any:
    from qat.report.report import collect, summary_table

    report = study.run()
    return {"summary": summary_table(collect(study.folder)), "report": report}


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
    _add_layout_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be trained")


def run_sweep(options: Namespace) -> Any:
    from qat.campaign.sweep import read_plan, train_all

    trainings = read_plan(options.plan)
    layout = _layout(options)
    if options.dry_run:
        runs = [{"run": path.as_posix(), "folder": str(options.out / path)} for path in trainings]
        return {"trainings": len(runs), "runs": runs, "problems": []}
    outcomes = train_all(trainings, options.out, layout)
    return {
        "runs": [
            {
                "run": one.path.as_posix(),
                "status": one.status,
                "epochs": one.result and one.result["epochs"],
                "accuracy": one.result and one.result["parts"]["test"].get("accuracy"),
                "folder": str(options.out / one.path),
            }
            for one in outcomes
        ],
        "problems": [{"run": one.path.as_posix(), "problem": one.error} for one in outcomes if one.error],
    }


def _add_layout_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--at-once", type=int, default=1, help="trainings side by side in each job, on its one GPU")
    parser.add_argument(
        "--jobs",
        type=int | None,
        default=None,
        help="jobs that share the runs (default: one for each visible GPU, or one)",
    )
    parser.add_argument(
        "--cluster",
        choices=["auto", "local", "slurm"],
        default="auto",
        help="this machine, or a job array of Slurm; auto is slurm where there is an sbatch",
    )
    parser.add_class_arguments(SlurmConfig, "slurm")


def _layout(options: Namespace) -> Any:
    from qat.campaign.sweep import Layout

    return Layout(options.at_once, options.jobs, options.cluster, options.slurm)


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
    parser.add_argument("--preset", type=str, default="paper", help="paper, released-code or demo")
    parser.add_argument("--settings", type=Path | None, default=None, help="file of layers that lie over the preset's")
    parser.add_argument("--folders", type=dict[str, Path], default={}, help="of corpora (default: corpora/NAME)")
    parser.add_class_arguments(Selection)
    _add_layout_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be trained, and what it may cost")
    parser.add_class_arguments(Assumed, "assumed")


def run_grid(options: Namespace) -> Any:
    from qat.campaign.cost import estimate
    from qat.campaign.grid import Grid

    layout, selection = _layout(options), instance(Selection, options)
    grid = Grid(options.out, options.preset, selection, options.folders, options.settings)
    total = {"trainings": len(grid.plan.trainings), "finished": len(grid.plan.finished())}
    if options.dry_run:
        stages = estimate(grid.plan, grid.table, options.assumed)
        runs = {"runs": grid.table.to_dict("records")} if options.json else {}
        note = (
            "estimated, not measured: what is left to train, one after another on one device, by counting "
            "multiplications; epochs and tflops (1e12 operations a second) are assumed or taken from finished "
            "trainings, as `basis` says"
        )
        hours = {"gpu_hours": round(float(stages["hours"].sum()), 1), "note": note}
        return total | {"stages": stages.to_dict("records")} | hours | runs | {"problems": []}
    if missing := grid.missing():
        raise ValueError("; ".join(missing))
    grid.write()
    outcomes = grid.plan.run(layout)
    names = dict(zip(grid.table["run"], grid.table["name"], strict=True))
    return {
        **total,
        "finished": sum(one.status == "finished" for one in outcomes),
        "folder": options.out,
        "problems": [
            {"training": names[one.path.name], "run": one.path.as_posix(), "problem": one.error}
            for one in outcomes
            if one.error
        ],
    }


def add_preset(commands: Commands) -> None:
    """``qat preset``."""
    parser = commands.add(
        "preset",
        run_preset,
        "Print a preset's settings of one training, for `qat train --config FILE` (or `qat pretrain ...`): the paper's "
        "reading of what paper and released code disagree on, or the code's.",
    )
    parser.add_argument("name", type=str, help="paper, released-code or demo")
    parser.add_argument("--stage", choices=[*VALUES["stage"]], default="emotion")
    parser.add_argument("--network", choices=[*VALUES["network"]], default="quaternion", help="not in RH-Emo's stages")
    parser.add_argument(
        "--corpus", choices=[*CORPORA], default="iemocap", help="this and what follows: of stage emotion"
    )
    parser.add_argument("--split", choices=[*VALUES["split"]], default="random")
    parser.add_argument(
        "--at", choices=[*VALUES["at"]], default="none", help="anti-transfer against (S)peakers, (W)ords"
    )
    parser.add_argument("--layer", choices=[*VALUES["layer"]][1:], type=int, default=2, help="of anti-transfer")


def run_preset(options: Namespace) -> Any:
    import yaml

    from qat.campaign.grid import base
    from qat.config.preset import experiment, merge, read_layers

    place = {} if options.stage.startswith("rhemo") else {"network": options.network}
    if options.stage == "emotion":
        place |= {name: options[name] for name in ("corpus", "split", "at")}
        place["layer"] = 0 if options.at == "none" else options.layer
    settings = merge({"stage": options.stage, **place}, read_layers(options.name), base(options.stage, place))
    # Whole, because other commands have other defaults; but for the folder, which is the user's to say.
    whole = to_plain(experiment(settings, options.stage))
    del whole["corpus"]["folder"]
    if place.get("layer"):
        whole["anti_transfer"]["layers"] = [place["layer"]]
    return whole if options.json else yaml.safe_dump(whole, sort_keys=False)
