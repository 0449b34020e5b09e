"""The command ``qat``: every stage of the method from the shell.

Exit codes: 0 done; 1 training failed, or a checked corpus has unusable files; 2 bad input, which one line on stderr
names; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

import qat
from qat.campaign.cost import Assumed
from qat.campaign.grid import CORPORA, Selection
from qat.campaign.sweep import SlurmConfig
from qat.config import CorpusConfig, Experiment, RHEmoExperiment, SpectrogramConfig, TrainingConfig, to_plain
from qat.config.preset import VALUES

Command = Callable[[Namespace], Any]

SUMMARY = {
    "name": "setting",
    "accuracy": "accu-\nracy",
    "accuracy_low": "95 %\nlow",
    "accuracy_high": "95 %\nhigh",
    "difference": "AT\ngains",
    "withheld_accuracy": "with-\nheld",
    "shortcut_rate": "short-\ncut",
    "voice_probe": "voice\nprobe",
}
"""What a terminal has room for; ``summary.csv`` and ``--json`` have every column."""


RHEMO_HELP = (
    "Train one stage of RH-Emo. The defaults are stage 1 (reconstruction). Stage 2 (with emotions): --training.initial "
    "STAGE1 --rhemo.beta 0.01 --training.lr 1e-6 --training.batch 20 --training.patience 30 "
    "--training.weight_decay 1e-5"
)

CHECK_HELP = (
    "Compare a corpus with what is published of it, and try to read every file. `problems` are files that are missing "
    "or cannot be used, and make the exit code 1; `remarks` are files that are not part of it, or the same as another."
)

GRID_HELP = (
    "Train the paper's grid, or a part of it: RH-Emo, the networks of words and speakers, then for each corpus, split "
    "and network one without anti-transfer and one for each kind of it and layer. What is finished is never trained "
    "again."
)

GRID_HOURS = (
    "estimated, not measured: what is left to train, one after another on one device, by counting multiplications; "
    "epochs and tflops (1e12 operations a second) are assumed or taken from finished trainings, as `basis` says"
)

PRESET_HELP = (
    "Print a preset's settings of one training, for `qat train --config FILE` (or `qat pretrain ...`): the paper's "
    "reading of what paper and released code disagree on, or the code's."
)

STUDY_HELP = (
    "Does anti-transfer help, where and why: many settings and seeds on a small corpus, in hours on two cores. The "
    "same command goes on where it was stopped."
)

SWEEP_HELP = (
    "Train every combination of what varies in a plan: `base` has the settings of `qat train`, `vary` a list of values "
    "for each dotted setting, e.g. `training.seed: [1, 2]`. Each run has its own process and folder; one that fails "
    "ends no other."
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    logging.basicConfig(format="qat: %(message)s", level=logging.WARNING)
    parser, commands = _parser()
    options = parser.parse_args(arguments)
    name, leaf = options.subcommand, options[options.subcommand]
    while "subcommand" in leaf:
        name, leaf = f"{name} {leaf.subcommand}", leaf[leaf.subcommand]
    try:
        options = parser.instantiate(options)
        for word in name.split():
            options = options[word]
        result = commands[name](options)
    except (ValueError, OSError) as error:
        return _fail(name, error, 2)
    except FloatingPointError as error:
        return _fail(name, error, 1)
    except KeyboardInterrupt:
        again = "the same command with --resume" if "resume" in leaf else "the same command"
        return _fail(name, f"interrupted; what is finished is kept, and {again} goes on", 130)
    if int(os.environ.get("RANK", 0)) == 0:
        _print(result, options.json)
    return 1 if name in ("corpus check", "sweep", "grid") and result["problems"] else 0


class _Parser(ArgumentParser):
    """A parser that answers bad input with one line instead of a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(ex or message).split())
        print(f"{self.prog.replace(' [options]', '')}: {text}", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> tuple[ArgumentParser, dict[str, Command]]:
    commands: dict[str, Command] = {}
    parser = _Parser(
        prog="qat",
        description="Speech emotion recognition with quaternion networks and anti-transfer learning. "
        "Start with `qat demo`; `qat COMMAND --help` explains each command.",
        version=qat.__version__,
    )
    top = parser.add_subcommands(required=True)

    def command(group: Any, name: str, function: Command, text: str) -> ArgumentParser:
        sub = _Parser(description=text)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        group.add_subcommand(name.split()[-1], sub, help=text)
        commands[name] = function
        return sub

    def family(name: str, text: str) -> Any:
        sub = _Parser(description=text)
        top.add_subcommand(name, sub, help=text)
        return sub.add_subcommands(required=True)

    sub = command(top, "demo", _demo, "The whole method on a small corpus, from recordings to a report.")
    _study_arguments(sub, "demo", seeds=1)
    sub.add_argument("--recipe", choices=["small", "paper"], default="small", help="what learns here, or the paper's")
    sub = command(top, "study", _study, STUDY_HELP)
    _study_arguments(sub, "study", seeds=5)
    sub.add_argument("--layers", type=list[int], default=[2, 7, 13], help="of the quaternion network")
    sub.add_argument("--real", type=bool, default=True, help="also the real network")
    sub.add_argument("--brief", action="store_true", help="about half of the settings")

    group = family("corpus", "Make, fetch and check corpora.")
    command(group, "corpus list", _corpus_list, "The corpora that are known.")
    sub = command(group, "corpus make", _corpus_make, "Synthesise a corpus.")
    _corpus_arguments(sub)
    sub = command(group, "corpus fetch", _corpus_fetch, "Fetch recorded human speech from Debian's archive.")
    _corpus_arguments(sub)
    sub.add_argument("--from", type=Path | None, default=None, help="folder of packages that are downloaded already")
    sub = command(group, "corpus check", _corpus_check, CHECK_HELP)
    sub.add_argument("name", type=str, help="of the corpus; `qat corpus list` shows them")
    sub.add_argument("dir", type=Path | None, nargs="?", default=None, help="its folder (the manifest file for csv)")
    sub.add_argument("--folder", type=Path | None, default=None, help="the same")
    sub.add_argument("--options", type=dict[str, Any], default={}, help="of its reader, e.g. '{words: 500}'")

    sub = command(top, "prepare", _prepare, "Decode a corpus and store its spectrograms, once.")
    sub.add_class_arguments(CorpusConfig, "corpus")
    sub.add_class_arguments(SpectrogramConfig, "features")
    sub.add_argument("--cache", type=Path, default=Experiment().cache, help="where prepared spectrograms are kept")

    group = family("pretrain", "Train RH-Emo and the networks of the orthogonal tasks.")
    sub = command(group, "pretrain rhemo", _pretrain_rhemo, RHEMO_HELP)
    _training_arguments(sub, RHEmoExperiment())
    orthogonal = TrainingConfig(lr=5e-5, batch=300, epochs=500)
    for task, defaults in (
        ("words", Experiment(task="word", features=SpectrogramConfig(cut="word"), training=orthogonal)),
        ("speakers", Experiment(task="speaker", training=orthogonal)),
    ):
        sub = command(group, f"pretrain {task}", _train, f"Train a network that recognises {task}.")
        _training_arguments(sub, defaults)
    sub = command(top, "train", _train, "Train an emotion classifier, with or without anti-transfer.")
    _training_arguments(sub, Experiment())

    sub = command(top, "sweep", _sweep, SWEEP_HELP)
    sub.add_argument("plan", type=Path, help="YAML file of settings and of what varies")
    sub.add_argument("--out", type=Path, required=True, help="folder for all runs; the same again goes on with them")
    _layout_arguments(sub)
    sub.add_argument("--dry-run", action="store_true", help="only tell what would be trained")

    sub = command(top, "grid", _grid, GRID_HELP)
    sub.add_argument("--out", type=Path, required=True, help="folder for everything; the same again goes on with it")
    sub.add_argument("--preset", type=str, default="paper", help="paper, released-code or demo")
    sub.add_argument("--settings", type=Path | None, default=None, help="file of layers that lie over the preset's")
    sub.add_argument("--folders", type=dict[str, Path], default={}, help="of corpora (default: corpora/NAME)")
    sub.add_class_arguments(Selection)
    _layout_arguments(sub)
    sub.add_argument("--dry-run", action="store_true", help="only tell what would be trained, and what it may cost")
    sub.add_class_arguments(Assumed, "assumed")

    sub = command(top, "preset", _preset, PRESET_HELP)
    sub.add_argument("name", type=str, help="paper, released-code or demo")
    sub.add_argument("--stage", choices=[*VALUES["stage"]], default="emotion")
    sub.add_argument("--network", choices=[*VALUES["network"]], default="quaternion", help="not in RH-Emo's stages")
    sub.add_argument("--corpus", choices=[*CORPORA], default="iemocap", help="this and what follows: of stage emotion")
    sub.add_argument("--split", choices=[*VALUES["split"]], default="random")
    sub.add_argument("--at", choices=[*VALUES["at"]], default="none", help="anti-transfer against (S)peakers, (W)ords")
    sub.add_argument("--layer", choices=[*VALUES["layer"]][1:], type=int, default=2, help="of anti-transfer")

    sub = command(top, "evaluate", _evaluate, "Judge a trained classifier on its own parts or on another corpus.")
    sub.add_argument("run", type=Path, help="run folder or checkpoint")
    sub.add_argument(
        "--corpus",
        type=CorpusConfig | None,
        default=None,
        help="another corpus with the same labels: --corpus.name csv --corpus.folder my.csv",
    )
    sub.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1...")
    sub = command(top, "predict", _predict, "Classify audio files.")
    sub.add_argument("run", type=Path, help="run folder or checkpoint")
    sub.add_argument("files", type=Path, nargs="+", help="wav, flac, mp3, ogg or opus")
    sub.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1...")
    sub = command(top, "report", _report, "A table and an HTML page from finished runs, or from a grid's.")
    sub.add_argument("folder", type=Path, help="folder that holds runs, at any depth")
    sub.add_argument("--out", type=Path | None, default=None, help="HTML file (default: report.html in the folder)")
    command(top, "doctor", _doctor, "What is installed, what works here and what is missing.")
    return parser, commands


def _study_arguments(sub: ArgumentParser, name: str, seeds: int) -> None:
    sub.add_argument(
        "--speech",
        choices=["synthetic", "recorded"],
        default="synthetic",
        help="synthesised on the spot, or human speech (290 MB) from Debian's archive",
    )
    sub.add_argument("--from", type=Path | None, default=None, help="folder of Debian packages downloaded already")
    sub.add_argument(
        "--out", type=Path | None, default=None, help=f"folder for everything (default: runs/{name}-SPEECH)"
    )
    sub.add_argument("--seeds", type=int, default=seeds, help="repeat every emotion training with so many seeds")
    sub.add_argument("--workers", type=int, default=2, help="trainings at once, one thread each")


def _corpus_arguments(sub: ArgumentParser) -> None:
    sub.add_argument("name", type=str, help="of the corpus; `qat corpus list` shows them")
    sub.add_argument("--folder", type=Path, required=True, help="its folder (the manifest file for csv)")


def _layout_arguments(sub: ArgumentParser) -> None:
    sub.add_argument("--at-once", type=int, default=1, help="trainings side by side in each job, on its one GPU")
    sub.add_argument(
        "--jobs",
        type=int | None,
        default=None,
        help="jobs that share the runs (default: one for each visible GPU, or one)",
    )
    sub.add_argument(
        "--cluster",
        choices=["auto", "local", "slurm"],
        default="auto",
        help="this machine, or a job array of Slurm; auto is slurm where there is an sbatch",
    )
    sub.add_class_arguments(SlurmConfig, "slurm")


def _training_arguments(sub: ArgumentParser, defaults: Experiment | RHEmoExperiment) -> None:
    sub.add_argument("--config", action="config", help="YAML file of settings; options after it win")
    sub.add_argument("--out", type=Path, required=True, help="run folder")
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    sub.add_argument("--profile", action="store_true", help="where a step's time goes: profile.txt and Chrome traces")
    sub.add_class_arguments(type(defaults))
    sub.set_defaults({name: value for name, value in to_plain(defaults).items() if name != "corpus"})


def _chosen(kind: type[Any], options: Namespace) -> Any:
    return kind(**{field.name: options[field.name] for field in dataclasses.fields(kind)})


def _demo(options: Namespace) -> Any:
    from qat.campaign.study import Study

    return _studied(Study(*_material(options, "demo"), options.recipe, _seeds(options), options.workers))


def _study(options: Namespace) -> Any:
    from qat.campaign.inquiry import Inquiry

    folder, material = _material(options, "study")
    chosen = {"layers": tuple(options.layers), "real": options.real, "brief": options.brief}
    return _studied(Inquiry(folder, material, seeds=_seeds(options), workers=options.workers, **chosen))


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


def _corpus_list(options: Namespace) -> Any:
    from qat.data import corpora

    known = {
        name: dataclasses.asdict(about) | {"options": ", ".join(corpora.options(name))}
        for name, about in corpora.CORPORA.items()
    }
    if options.json:
        return known
    for about in known.values():
        about["what"] = "\n    ".join([about["what"], *(f"{k}: {v}" for k, v in about.items() if v and k != "what")])
    return {name: about["what"] for name, about in known.items()}


def _corpus_make(options: Namespace) -> Any:
    return _counted(_maker(options, "make", "fetch")(options.folder))


def _corpus_fetch(options: Namespace) -> Any:
    return _counted(_maker(options, "fetch", "make")(options.folder, from_dir=options["from"]))


def _maker(options: Namespace, verb: str, other: str) -> Callable[..., Any]:
    from qat.data.corpora import CORPORA, module

    corpus = module(options.name)
    if not hasattr(corpus, verb):
        source = CORPORA[options.name].source
        how = f"use `{source}`" if hasattr(corpus, other) else f"get it from {source}"
        raise ValueError(f"{options.name}: cannot be had with `corpus {verb}`; {how}")
    function: Callable[..., Any] = getattr(corpus, verb)
    return function


def _corpus_check(options: Namespace) -> Any:
    from qat.data import corpora

    folder = options.dir or options.folder
    if folder is None or (options.dir and options.folder):
        raise ValueError(f"name the folder of {options.name} once: `qat corpus check {options.name} DIR`")
    found = corpora.check(options.name, folder, **options.options)
    return _counted(found.manifest) | {
        "unusable": len(found.problems),
        "problems": found.problems.to_dict("records"),
        "remarks": found.remarks.to_dict("records"),
    }


def _counted(manifest: Any) -> dict[str, Any]:
    table = manifest.table
    segments = {"segments": len(table)} if "start" in table else {}
    return {
        "corpus": manifest.name,
        "folder": manifest.root,
        "files": table["path"].nunique(),
        **segments,
        "hours": round(float(table["duration"].sum()) / 3600, 3),
        "speakers": table["speaker"].nunique(),
        "emotions": {k: int(n) for k, n in table["emotion"].value_counts().items() if k},
    }


def _prepare(options: Namespace) -> Any:
    from qat.data.store import prepare
    from qat.training.data import read_corpus

    store = prepare(read_corpus(options.corpus), options.features, options.cache)
    return {"store": store.folder, "cuts": len(store), "skipped": len(store.skipped)}


def _pretrain_rhemo(options: Namespace) -> Any:
    from qat.training.pipeline import pretrain_rhemo

    return pretrain_rhemo(
        _chosen(RHEmoExperiment, options), options.out, resume=options.resume, profile=options.profile
    )


def _train(options: Namespace) -> Any:
    from qat.training.pipeline import train_classifier

    return train_classifier(_chosen(Experiment, options), options.out, resume=options.resume, profile=options.profile)


def _sweep(options: Namespace) -> Any:
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


def _layout(options: Namespace) -> Any:
    from qat.campaign.sweep import Layout

    return Layout(options.at_once, options.jobs, options.cluster, options.slurm)


def _grid(options: Namespace) -> Any:
    from qat.campaign.cost import estimate
    from qat.campaign.grid import Grid

    layout, selection = _layout(options), Selection(**{f.name: options[f.name] for f in dataclasses.fields(Selection)})
    grid = Grid(options.out, options.preset, selection, options.folders, options.settings)
    total = {"trainings": len(grid.plan.trainings), "finished": len(grid.plan.finished())}
    if options.dry_run:
        stages = estimate(grid.plan, grid.table, options.assumed)
        runs = {"runs": grid.table.to_dict("records")} if options.json else {}
        hours = {"gpu_hours": round(float(stages["hours"].sum()), 1), "note": GRID_HOURS}
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


def _preset(options: Namespace) -> Any:
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


def _evaluate(options: Namespace) -> Any:
    from qat.training.pipeline import evaluate_run

    return {"parts": evaluate_run(options.run, options.corpus, device=options.device)}


def _predict(options: Namespace) -> Any:
    from qat.training.pipeline import predict

    return predict(options.run, options.files, device=options.device).to_dict("records")


def _report(options: Namespace) -> Any:
    from qat.report.report import report_tables, write_report

    report = write_report(options.folder, options.out)
    return {**report_tables(options.folder, report, short=not options.json), "report": report}


def _doctor(options: Namespace) -> Any:
    from qat.doctor import examine

    return examine()


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2, default=_jsonable))
        return
    from rich.console import Console

    console = Console()
    if isinstance(result, str):
        print(result, end="")
        return
    if isinstance(result, list):
        console.print(_table(result))
        return
    for name, value in result.items():
        if name == "parts":
            names = dict.fromkeys(n for metrics in value.values() for n in metrics if n != "confusion")
            console.print(_table([{"": n} | {part: metrics.get(n) for part, metrics in value.items()} for n in names]))
        elif name in ("problems", "remarks", "runs", "stages", "table1"):
            if value:
                console.print(_table(value))
        elif name == "summary":
            shown = value[list(SUMMARY)].dropna(subset="accuracy").dropna(axis=1, how="all")
            console.print(_table(shown.round(3).rename(columns=SUMMARY).to_dict("records")))
        elif name != "experiment" and not (isinstance(value, (list, dict)) and not value):
            console.print(f"{name}: {value}", highlight=False)


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _jsonable(value: Any) -> Any:
    return value.to_dict("records") if hasattr(value, "to_dict") else str(value)


def _fail(command: str, error: object, code: int) -> int:
    print(f"qat {command}: {error}", file=sys.stderr)
    return code
