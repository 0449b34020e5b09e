"""Finished runs, read from their folders, grouped over seeds and compared."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.config import EXECUTION, flatten
from qat.config.plain import with_loss
from qat.results.statistics import (
    Difference,
    cluster_interval,
    false_discovery,
    mean_and_sd,
    over_seeds,
    paired_difference,
)
from qkernels.losses import loss_of

if TYPE_CHECKING:
    import pandas as pd

TASKS = {
    "emotion": "emotion",
    "rhemo": "RH-Emo embedding",
    "speaker": "who speaks",
    "word": "which word",
    "word-presence": "which words occur",
}
"""What networks are trained for, in the order of a report."""

POSITIONS = {
    "relu": "after ReLU, before pooling",
    "pre-relu": "before ReLU",
    "slice": "input of that convolution",
    "pool5": "last pool, whatever the layer",
}
"""Which features a layer stands for, by ``anti_transfer.position``."""
_SEED = re.compile(r"(?:^|[-_./])seed[-_=]?(\d+)(?=$|[-_./])", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Run:
    """One training, as its folder tells it; whatever it does not tell is absent.

    Args:
        folder: where it lies.
        name: of its setting; runs of one name differ by their seed.
        seed: of the training.
        result: ``result.json``.
        analysis: ``analysis.json``, or nothing.
        metrics: ``metrics.csv``, one row per epoch.
        predictions: ``predictions.csv`` as text.
    """

    folder: Path
    name: str
    seed: int | None
    result: dict[str, Any]
    analysis: dict[str, Any]
    metrics: pd.DataFrame | None
    predictions: pd.DataFrame | None

    @property
    def task(self) -> str:
        """``rhemo``, or what the classifier recognises."""
        return "rhemo" if self.result.get("kind") == "rhemo" else str(self.setting("task", "emotion"))

    @property
    def classes(self) -> list[str]:
        return [str(name) for name in self.result.get("classes") or []]

    @property
    def true_classes(self) -> list[str]:
        """The classes without what `network.outputs` adds to them."""
        return [name for name in self.classes if not name.startswith("unused-")]

    def setting(self, dotted: str, default: Any = None) -> Any:
        """The experiment's value at ``anti_transfer.beta``, say."""
        return _at(self.result.get("experiment"), dotted, default)

    def score(self, part: str, name: str) -> float | None:
        """A figure of one part, where it was measured."""
        return number(_at(self.result, f"parts.{part}.{name}"))

    @property
    def start(self) -> str:
        """What the weights were before the first step: ``random``, or the network they come from."""
        initial = self.setting("training.initial")
        return "random" if initial is None else _origin(initial)

    @property
    def has_twin(self) -> bool:
        return self.setting("anti_transfer.twin") is not None or self.random_twin

    @property
    def random_twin(self) -> bool:
        return bool(self.setting("anti_transfer.random_twin", False))

    @property
    def _betas(self) -> list[float]:
        beta = self.setting("anti_transfer.beta", 1.0)
        return [float(value) for value in (beta if isinstance(beta, list) else [beta])]

    @property
    def beta(self) -> str:
        """The weight of all layers, or that of each."""
        return "+".join(f"{beta:g}" for beta in self._betas)

    @property
    def transfers(self) -> bool:
        """Whether an anti-transfer loss took part; beta 0 only watches the similarity."""
        return self.has_twin and any(self._betas)

    @property
    def layers(self) -> list[int]:
        """Where the twin is compared."""
        return list(self.setting("anti_transfer.layers", [])) if self.has_twin else []

    @property
    def anti_transfer(self) -> str:
        """Layer, its convention, beta, twin and what is compared, or ``none``."""
        layers = f"layer{'s' if len(self.layers) > 1 else ''} {'+'.join(map(str, self.layers))}"
        if not self.transfers:
            return f"none ({layers} watched, beta 0)" if self.has_twin else "none"
        position = self.setting("anti_transfer.position", "relu")
        twin = "random twin (control)" if self.random_twin else f"twin {_origin(self.setting('anti_transfer.twin'))}"
        place = f"{layers} ({POSITIONS.get(position, position)})"
        loss = loss_of(with_loss(self.setting("anti_transfer")).get("loss", "gram-channel"))
        return f"{place}, beta {self.beta}, {twin}, {loss}"

    @property
    def device(self) -> str:
        """Where it was trained, with the number of processes if there were several."""
        processes = int(number(self.result.get("processes")) or 1)
        return f"{f'{processes} × ' if processes > 1 else ''}{self.result.get('device', 'an unnamed device')}"

    def probe(self, name: str, layer: int) -> float | None:
        """A linear probe's accuracy at one layer, ``voice_probe`` or ``word_probe``."""
        return number(_at(self.analysis, f"layers.{layer}.{name}"))

    @cached_property
    def answers(self) -> pd.DataFrame | None:
        """Test answers: ``speaker`` and ``right`` (0 or 1) by ``clip``; several cuts of a file are several clips.

        Nothing for word presence, where a clip has several answers.
        """
        table = self.predictions
        if table is None or self.task == "word-presence":
            return None
        if not {"part", "path", "speaker", "label", "predicted"} <= set(table.columns):
            return None
        test = table[table["part"] == "test"]
        clips = test["path"] + "#" + test.groupby("path").cumcount().astype(str)
        right = (test["label"] == test["predicted"]).astype(float)
        return test.assign(clip=clips, right=right).set_index("clip")[["speaker", "right"]].sort_index()


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one setting, by seed."""

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        """A figure of every run that has it."""
        return [value for value in map(of, self.runs) if value is not None]

    def mean(self, of: Callable[[Run], float | None]) -> float | None:
        values = self.values(of)
        return mean_and_sd(values)[0] if values else None


def collect(folder: Path) -> list[Run]:
    """All runs at or below ``folder``: every folder that holds a ``result.json``.

    A run is called what ``result.json`` says, or by its path below ``folder``; a seed in either is left out.

    Raises:
        ValueError: there is none, a file cannot be read, or two runs have the same name and seed.
    """
    files = sorted(Path(folder).rglob("result.json"))
    if not files:
        raise ValueError(f"{folder}: no result.json at or below this folder; a report needs at least one finished run")
    seen: dict[tuple[str, int | None], Run] = {}
    for file in files:
        run = _run(file.parent, Path(folder))
        other = seen.setdefault((run.name, run.seed), run)
        if other is not run:
            raise ValueError(
                f"{run.folder}: has the name {run.name!r} and the seed {run.seed} of {other.folder}; "
                "a report takes each once"
            )
    return list(seen.values())


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Runs by name: by task, then those from random weights first, those without anti-transfer first."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    tasks = list(TASKS)

    def place(group: Group) -> tuple[Any, ...]:
        run = group.first
        task = tasks.index(run.task) if run.task in tasks else len(tasks)
        layer = max(run.layers, default=0)
        return task, run.start != "random", run.start, run.transfers, run.random_twin, layer, group.name

    groups = [Group(name, sorted(same, key=lambda run: run.seed or 0)) for name, same in by_name.items()]
    return sorted(groups, key=place)


def summary_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row per setting (runs of one name), figures over its seeds; what was not measured is NaN or None.

    Emotion classifiers come first, then the networks that were trained for them. Shares lie in [0, 1].

    Returns:
        Columns ``name``, ``task``, ``start`` (initial weights), ``anti_transfer``, ``seeds``; ``accuracy`` (test part,
        mean over seeds), ``accuracy_sd`` (over seeds), ``accuracy_low`` and ``accuracy_high`` (95 % interval over
        speakers, seeds pooled), ``uar``, ``average_precision``; ``baseline`` (the setting that differs in nothing but
        having no anti-transfer), ``difference``, ``difference_low`` and ``difference_high`` from it (same seeds and
        clips, paired); ``withheld_accuracy``, ``shortcut_rate``, ``voice_probe``, ``word_probe``; ``reconstruction``
        and ``constant`` (RH-Emo's binary cross-entropy and the best constant's); ``speakers`` and ``clips`` of the test
        part; ``parameters``, ``epochs``, ``kept_epoch`` (from 1), ``epoch_seconds``, ``seconds`` (of one run) and
        ``peak_memory`` (bytes, highest).
    """
    import pandas as pd

    groups = group_runs(runs)
    table = pd.DataFrame([_summary(group, groups) for group in groups])
    words = {"name", "task", "start", "anti_transfer", "baseline", "seeds"}
    return table.astype({column: float for column in table.columns if column not in words})


MEASURES = {
    "accuracy": "accuracy",
    "withheld_accuracy": "accuracy, withheld",
    "shortcut_rate": "shortcut rate",
    "voice_probe": "voice probe",
    "word_probe": "word probe",
}
"""What `seed_differences` compares, in the order of a report."""


def seed_differences(runs: Iterable[Run]) -> pd.DataFrame:
    """What anti-transfer changed, as differences between trainings of the same seed.

    Each setting with anti-transfer is compared with its baseline (which differs in nothing but having none) and, where
    there is one, with its control (which differs in nothing but a twin that was trained on nothing). Probes of both are
    those of the setting's last layer.

    Returns:
        One row a comparison and measure: ``name``, ``other``, ``against`` (``baseline`` or ``control``), ``measure``
        (of `MEASURES`), ``seeds``, ``mean``, ``low`` and ``high`` (95 % over seeds), ``rose`` and ``fell`` (seeds),
        ``p`` (paired t test) and ``q`` (adjusted for all comparisons of this measure and kind, Benjamini-Hochberg).
    """
    import pandas as pd

    groups = group_runs(runs)
    rows: list[tuple[Any, ...]] = []
    for group in groups:
        for against, other in (("baseline", _baseline(group, groups)), ("control", _control(group, groups))):
            for measure in MEASURES if other else ():
                assert other is not None
                layer = group.first.layers[-1]
                both = [(_measured(a, measure, layer), _measured(b, measure, layer)) for a, b in _pairs(group, other)]
                known = [(a, b) for a, b in both if a is not None and b is not None]
                if known:
                    found = over_seeds(*zip(*known, strict=True))
                    low, high = found.interval or (None, None)
                    names = (group.name, other.name, against, measure, len(known))
                    rows.append((*names, found.mean, low, high, found.rose, found.fell, found.p, None))
    columns = ["name", "other", "against", "measure", "seeds", "mean", "low", "high", "rose", "fell", "p", "q"]
    table = pd.DataFrame(rows, columns=columns).astype({name: float for name in ("mean", "low", "high", "p", "q")})
    for _, same in table[table["p"].notna()].groupby(["against", "measure"]):
        table.loc[same.index, "q"] = false_discovery(same["p"].tolist())
    return table


def _measured(run: Run, measure: str, layer: int) -> float | None:
    if measure == "accuracy":
        return run.score("test", "accuracy")
    if measure == "withheld_accuracy":
        return run.score("withheld", "accuracy")
    return number(run.analysis.get(measure)) if measure == "shortcut_rate" else run.probe(measure, layer)


def devices(runs: Iterable[Run]) -> str:
    """Every device that one of these runs was trained on."""
    return "; ".join(sorted({run.device for run in runs}))


def made_with(runs: Sequence[Run]) -> list[list[str]]:
    """What these runs were made with: the devices, and every version of each program, a row each."""
    versions: dict[str, set[str]] = {}
    for run in runs:
        for name, version in (run.result.get("versions") or {}).items():
            versions.setdefault(str(name), set()).add(str(version))
    return [["devices", devices(runs)], *([name, ", ".join(sorted(found))] for name, found in versions.items())]


def number(value: Any) -> float | None:
    """A finite number, or nothing."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if numeric else None


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        ValueError: it is not readable, not JSON or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _read_csv(path: Path, **options: Any) -> pd.DataFrame | None:
    import pandas as pd

    if not path.is_file():
        return None
    try:
        return pd.read_csv(path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as CSV ({error})") from error


def _run(folder: Path, top: Path) -> Run:
    result = read_json(folder / "result.json")
    path = folder.relative_to(top).as_posix()
    own = folder.resolve().name
    # A run that was given no name bears its folder's, which says little where folders of several parents meet.
    named = str(result.get("name") or own)
    name = _without_seed(named) if named != own else _without_seed(path if path != "." else own)
    analysis = folder / "analysis.json"
    in_path = _SEED.search(path)
    seed = number(result.get("seed", _at(result, "experiment.training.seed", int(in_path[1]) if in_path else None)))
    return Run(
        folder=folder,
        name=name,
        seed=None if seed is None else int(seed),
        result=result,
        analysis=read_json(analysis) if analysis.is_file() else {},
        metrics=_read_csv(folder / "metrics.csv"),
        predictions=_read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False),
    )


def _at(value: Any, dotted: str, default: Any = None) -> Any:
    for key in dotted.split("."):
        if not isinstance(value, dict) or value.get(key) is None:
            return default
        value = value[key]
    return value


def _without_seed(path: str) -> str:
    """
    >>> _without_seed("emotion/at-voice/seed-2"), _without_seed("seed3/at_voice"), _without_seed("at-seed1")
    ('emotion/at-voice', 'at_voice', 'at')
    """
    return _SEED.sub("", path).strip("/") or path


def _origin(checkpoint: Any) -> str:
    """The run that wrote a checkpoint, which is named by its folder or its file.

    >>> _origin("runs/voices/seed-1/best.safetensors"), _origin("demo/twins/voice")
    ('voices', 'voice')
    """
    path = Path(str(checkpoint))
    folder = path.parent if path.suffix == ".safetensors" else path
    return Path(_without_seed(folder.as_posix())).name or path.stem


def _summary(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    import pandas as pd

    accuracies = group.values(lambda run: run.score("test", "accuracy"))
    accuracy, deviation = mean_and_sd(accuracies) if accuracies else (None, None)
    answers = [run.answers for run in group.runs if run.answers is not None]
    speakers, interval = None, None
    if len(answers) == len(group.runs):
        pooled = pd.concat(answers)
        if (pooled["speaker"] != "").all():
            speakers = pooled["speaker"].nunique()
            interval = cluster_interval(pooled["right"], list(pooled["speaker"]))
    base = _baseline(group, groups)
    difference = clip_difference(group, base) if base else None
    best = group.mean(lambda run: number(run.result.get("kept_epoch")))

    def score(name: str, part: str = "test") -> float | None:
        return group.mean(lambda run: run.score(part, name))

    def result(name: str) -> float | None:
        return group.mean(lambda run: number(run.result.get(name)))

    def analysis(name: str) -> float | None:
        return group.mean(lambda run: number(run.analysis.get(name)))

    return {
        "name": group.name,
        "task": group.first.task,
        "start": group.first.start,
        "anti_transfer": group.first.anti_transfer,
        "seeds": len(group.runs),
        "accuracy": accuracy,
        "accuracy_sd": deviation,
        "accuracy_low": interval and interval.low,
        "accuracy_high": interval and interval.high,
        "uar": score("uar"),
        "average_precision": score("average_precision"),
        "baseline": base and base.name,
        "difference": difference and difference.mean,
        "difference_low": difference and difference.interval and difference.interval.low,
        "difference_high": difference and difference.interval and difference.interval.high,
        "withheld_accuracy": score("accuracy", "withheld"),
        "shortcut_rate": analysis("shortcut_rate"),
        "voice_probe": analysis("voice_probe"),
        "word_probe": analysis("word_probe"),
        "reconstruction": score("reconstruction"),
        "constant": score("constant"),
        "speakers": speakers,
        "clips": score("samples"),
        "parameters": result("parameters"),
        "epochs": result("epochs"),
        "kept_epoch": None if best is None else best + 1,
        "epoch_seconds": result("seconds_per_epoch"),
        "seconds": result("seconds"),
        "peak_memory": max(group.values(lambda run: number(run.result.get("peak_memory"))), default=None),
    }


def _baseline(group: Group, groups: Sequence[Group]) -> Group | None:
    """The setting without anti-transfer that agrees in all else on every shared seed; the one with most of them."""
    best, most = None, 0
    for other in groups if group.first.transfers else ():
        pairs = _pairs(group, other)
        same = all(_but_anti_transfer(a) == _but_anti_transfer(b) for a, b in pairs)
        if not other.first.transfers and same and len(pairs) > most:
            best, most = other, len(pairs)
    return best


def _control(group: Group, groups: Sequence[Group]) -> Group | None:
    """The setting that agrees in all on every shared seed, but for a random twin."""

    def settings(run: Run) -> dict[str, Any]:
        free = ("anti_transfer.twin", "anti_transfer.random_twin")
        at = flatten({"anti_transfer": run.setting("anti_transfer", {})})
        return _but_anti_transfer(run) | {key: value for key, value in at.items() if key not in free}

    for other in groups if group.first.transfers and not group.first.random_twin else ():
        pairs = _pairs(group, other)
        if other.first.random_twin and pairs and all(settings(a) == settings(b) for a, b in pairs):
            return other
    return None


def _pairs(first: Group, second: Group) -> list[tuple[Run, Run]]:
    by_seed = {run.seed: run for run in second.runs}
    return [(run, by_seed[run.seed]) for run in first.runs if run.seed in by_seed]


def _but_anti_transfer(run: Run) -> dict[str, Any]:
    """All settings that could change the outcome, but for anti-transfer."""
    settings = flatten(run.result.get("experiment") or {})

    free = ("anti_transfer.", "cache", *(f"training.{name}" for name in (*EXECUTION, "deterministic")))
    return {"kind": run.result.get("kind")} | {k: v for k, v in settings.items() if not k.startswith(free)}


def clip_difference(group: Group, base: Group) -> Difference | None:
    """Accuracy of the group minus the baseline's; no interval without both runs' answers to the same clips."""
    import pandas as pd

    pairs = _pairs(group, base)
    both = [
        (a.answers, b.answers)
        for a, b in pairs
        if a.answers is not None and b.answers is not None and a.answers.index.equals(b.answers.index)
    ]
    if len(both) == len(pairs) and all((a["speaker"] != "").all() for a, _ in both):
        first, second = pd.concat([a for a, _ in both]), pd.concat([b for _, b in both])
        return paired_difference(first["right"], second["right"], list(first["speaker"]))
    scores = [(a.score("test", "accuracy"), b.score("test", "accuracy")) for a, b in pairs]
    known = [a - b for a, b in scores if a is not None and b is not None]
    return Difference(mean_and_sd(known)[0], None) if len(known) == len(pairs) else None
