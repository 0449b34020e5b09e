"""The report: one HTML file that explains a folder of runs to somebody who has read nothing else."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qat.config import flatten
from qat.files import replacing
from qat.report import figures
from qat.report.figures import Measure
from qat.report.grid_report import write_grid_report
from qat.report.page import (
    Page,
    bar,
    count,
    decimal,
    duration,
    escaped,
    folded,
    interval,
    memory,
    percent,
    plus_minus,
    points,
    records,
    seed_count,
)
from qat.results.runs import (
    MEASURES,
    TASKS,
    Run,
    collect,
    devices,
    group_runs,
    made_with,
    number,
    read_json,
    seed_differences,
    summary_table,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Run", "collect", "summary_table", "write_report"]

_Row = dict[str, Any]


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of all runs at or below ``folder``, with ``summary.csv`` and ``differences.csv`` beside it.

    The file needs nothing else: no script, no network, figures inside. The same runs give the same bytes.

    Args:
        folder: holds the runs, and perhaps ``campaign.yaml`` with what was asked for.
        out: the HTML file; default ``report.html`` in ``folder``.

    Returns:
        The HTML file.

    Raises:
        ValueError: as in `collect`.
    """
    folder = Path(folder)
    out = folder / "report.html" if out is None else Path(out)
    if is_grid(folder):
        return write_grid_report(folder, out)
    runs = collect(folder)
    demo = read_json(folder / "demo.json") if (folder / "demo.json").is_file() else {}
    if (folder / "campaign.yaml").is_file():
        demo = yaml.safe_load((folder / "campaign.yaml").read_text(encoding="utf-8"))
        demo |= {"corpus": demo.get("about"), "recipe": demo.get("preset")}
        demo["synthetic"] = {run.setting("corpus.name") for run in runs} == {"demo"}
    table = summary_table(runs)
    page = _Page(folder, runs, table, demo)
    text = page.html()
    for name, listed in {"summary": table, "differences": page.paired}.items():
        with replacing(out.with_name(f"{name}.csv")) as draft:
            listed.to_csv(draft, index=False)
    page.write(out, text)
    return out


def is_grid(folder: Path) -> bool:
    """Whether a folder has a plan with cells of the paper's table 1."""
    if not (folder / "plan.csv").is_file():
        return False
    rows = list(csv.DictReader((folder / "plan.csv").read_text(encoding="utf-8").splitlines()))
    return not rows or any(row.get("at") != "" for row in rows)


class _Page(Page):
    """The sections."""

    def __init__(self, folder: Path, runs: Sequence[Run], table: pd.DataFrame, demo: dict[str, Any]) -> None:
        super().__init__()
        self.folder, self.runs, self.demo = folder, runs, demo
        self.table = table.set_index("name", drop=False)
        self.rows: dict[str, _Row] = {row["name"]: row for row in records(table)}
        self.groups = group_runs(runs)
        self.paired = seed_differences(runs)
        emotion = [group for group in self.groups if group.first.task == "emotion"]
        self.main = emotion or [group for group in self.groups if group.first.task != "rhemo"]
        self.others = [group for group in self.groups if group not in self.main]
        self.results = self.table.loc[[group.name for group in self.main]]
        self.synthetic = bool(demo.get("synthetic"))
        self.voice = "voice" if self.synthetic else "speaker"
        corpora = sorted({str(run.setting("corpus.name", "unnamed corpus")) for run in runs})
        self.corpus = str(demo.get("corpus") or ", ".join(corpora))
        if self.synthetic and "synthes" not in self.corpus:
            self.corpus = f"synthesised speech ({self.corpus})"
        self.mark = f"{self.corpus[:1].upper()}{self.corpus[1:]}"
        rules = {run.setting("split.rule") for group in self.main for run in group.runs}
        self.unseen, self.confounded = rules <= {"speaker", "confounded"}, "confounded" in rules
        self.devices = devices(runs)

    def html(self) -> str:
        sections = [
            ("What was trained", self.trained()),
            ("Results", self.headline() + self.pretrained()),
            ("Accuracy, and what networks still know", self.dots()),
            ("What anti-transfer changed, over seeds", self.differences()),
            ("Training curves", self.curves()),
            ("Confusion matrices", self.confusions()),
            ("Similarity to the frozen network", self.similarity()),
            ("Parameters, time and memory", self.stages() + self.resources()),
            ("What this cannot show", self.limits()),
            ("Provenance and settings", self.provenance()),
        ]
        label = (
            f'<p class="label"><strong>Synthesised speech.</strong> Every accuracy below was measured on '
            f"{escaped(self.corpus)}, not on human recordings. {escaped(self.demo.get('note', ''))}</p>"
        )
        return self.document(f"Report on {self.corpus}", sections, label if self.synthetic else "")

    # Words

    def conditions(self) -> str:
        """Where accuracy was measured: corpus, voices, clips and seeds."""
        clips, speakers = self.results["clips"].max(), self.results["speakers"].max()
        of = f" of {count(clips, 'clip')}" if clips == clips else ""
        by = f" by {count(speakers, self.voice)}" if speakers == speakers else ""
        unseen = " that the training part does not have" if by and self.unseen else ""
        return f"{self.mark}: test part{of}{by}{unseen}; {seed_count(self.results['seeds'])} a setting."

    def trained(self) -> str:
        seconds = sum(number(run.result.get("seconds")) or 0 for run in self.runs)
        runs = f"{count(len(self.runs), 'training')}{f', {duration(seconds)} in all' if seconds else ''}."
        if self.others:
            names = ", ".join(f"{g.name} ({TASKS.get(g.first.task, g.first.task)})" for g in self.others)
            runs += f" First, for the others to build on: {names}."
        if self.main:
            first = self.main[0].first
            classes = f" ({', '.join(first.true_classes)})" if 0 < len(first.classes) <= 12 else ""
            task = {"emotion": "the emotion", "speaker": "who speaks"}.get(first.task, "the words")
            runs += (
                f" Then {count(len(self.main), 'setting')} of {self.network()}, which tells {task}{classes} from a "
                f"few seconds of speech. {self.conditions()}"
            )
        shortcut, transfer = "", ""
        if self.confounded:
            leak = self.main[0].first.setting("split.leak", 0.1)
            shortcut = (
                f"The training part is confounded on purpose: each of its {self.voice}s says one emotion always and "
                f"the others with {100 * leak:g} % of its sentences. Who speaks then predicts the emotion: a "
                f"shortcut, which fails on every other {self.voice}."
            )
        if any(group.first.transfers for group in self.main):
            transfer = (
                "Anti-transfer (AT) is meant to keep a network from relying on what another task needs. A frozen "
                "network, the twin, was trained on that other task, such as telling who speaks. The loss then is "
                "cross-entropy + beta · cos², with the cosine between the Gram matrices of both networks' features at "
                "one layer: to resemble the twin costs."
            )
        if any(group.first.random_twin for group in self.main):
            transfer += " As a control, a random twin, trained on nothing, takes its place."
        if self.results["start"].nunique() > 1:
            transfer += " Training starts from random weights or from those of another network, which may be the twin."
        return "".join(f"<p>{escaped(text)}</p>" for text in (runs, shortcut, transfer) if text) + self.measures()

    def network(self) -> str:
        kinds = {run.setting("network.domain") for group in self.main for run in group.runs}
        widths = {number(run.setting("network.width", 1.0)) for group in self.main for run in group.runs}
        names = {
            "quaternion": "a quaternion VGG16 on the RH-Emo embedding",
            "real": "a real-valued VGG16 on the spectrogram",
            "real-on-embedding": "a real-valued VGG16 on the RH-Emo embedding",
        }
        name = names.get(kinds.pop(), "a classifier") if len(kinds) == 1 else "a VGG16"
        width = widths.pop() if len(widths) == 1 else None
        return f"{name}, {width:g} times as wide as the paper's" if width and width != 1 else name

    def measures(self) -> str:
        """What the columns mean, of those that are there."""
        meanings = {
            "accuracy": ("Accuracy", "share of test clips named rightly (weighted accuracy)."),
            "uar": ("UA", "unweighted accuracy: the share of each class that is named rightly, averaged over classes."),
            "difference": (
                "Difference",
                "accuracy minus that of the baseline, which has the same settings, initial weights, seeds and "
                "clips, but no anti-transfer.",
            ),
            "withheld_accuracy": (
                "Withheld",
                f"accuracy on the combinations of a training {self.voice} and an emotion that training lacks.",
            ),
            "shortcut_rate": (
                "Shortcut",
                f"share of the answers there that are the {self.voice}'s own emotion, the one it says in training. "
                "Lower is better.",
            ),
            "voice_probe": (
                "Voice probe",
                f"how well a linear classifier tells the {self.voice} from the features of the AT layer. Lower means "
                "that less of it is left.",
            ),
            "word_probe": ("Word probe", "the same for what is said."),
        }
        items = "".join(
            f"<dt>{name}</dt><dd>{escaped(meaning)}</dd>"
            for column, (name, meaning) in meanings.items()
            if self.results[column].notna().any()
        )
        return f"<dl>{items}</dl>" if items else ""

    def findings(self) -> str:
        """One sentence a comparison: what can be said, and whether it can."""
        items = []
        groups = {group.name: group for group in self.groups}
        for row in records(self.results[self.results["difference"].notna()]):
            base, low, high = dict(self.rows[row["baseline"]]), row["difference_low"], row["difference_high"]
            probe = partial(Run.probe, name="voice_probe", layer=groups[row["name"]].first.layers[-1])
            probed = groups[row["baseline"]].mean(probe)
            base["voice_probe"] = float("nan") if probed is None else probed
            if low != low:
                verdict = "there is no interval, so this says nothing"
            elif low <= 0 <= high:
                verdict = "the interval holds 0: no evidence of a difference"
            else:
                verdict = f"the interval excludes 0: {'better' if low > 0 else 'worse'} on {self.voice}s like these"
                if row["seeds"] == 1:
                    verdict += ", for this one seed"
            moved = ", ".join(
                f"{name} {percent(base[column])} → {percent(row[column])} %"
                for column, name in (("shortcut_rate", "shortcut"), ("voice_probe", "voice probe"))
                if row[column] == row[column] and base[column] == base[column]
            )
            items.append(
                f"<li><strong>{escaped(row['name'])}</strong> against {escaped(base['name'])}: {_difference(row)} "
                f"points of accuracy; {verdict}.{f' Beside it: {moved}.' if moved else ''}</li>"
            )
        return f"<ul>{''.join(items)}</ul>" if items else ""

    def limits(self) -> str:
        table, voice = self.results, self.voice
        items = [str(text) for text in self.demo.get("not_run") or []]
        if self.synthetic:
            items.append(
                "The speech is synthesised: its emotions are rules for pitch, rate and loudness, its voices "
                "variants of one synthesiser. Nothing here carries over to human speech or compares with published "
                "figures."
            )
        if (speakers := table["speakers"].min()) == speakers:
            width = 100 * (table["accuracy_high"] - table["accuracy_low"]).mean()
            text = (
                f"The test part has {count(speakers, voice)}. Clips of one {voice} are right or wrong together, so "
                f"the number of {voice}s limits what can be known, not that of clips."
            )
            if width == width:
                text += f" The intervals of accuracy are {width:.0f} points wide on average."
            if 1 < speakers < 20:
                text += " With so few, intervals said to hold the truth 95 times in 100 do so less often."
            items.append(text)
        known = table[table["difference_low"].notna()]
        if len(known):
            width = 50 * (known["difference_high"] - known["difference_low"]).mean()
            items.append(
                f"Paired differences are known to about ± {width:.0f} points; smaller effects cannot be told from none."
            )
        if len(known) > 1:
            items.append(
                f"{len(known)} differences are shown. Of 20 true zeros one has an interval without 0 by chance, and "
                "the largest of several looks larger than it is."
            )
        seeds = int(table["seeds"].min()) if len(table) else 0
        if seeds:
            rough = "With one seed" if seeds == 1 else f"With {seeds} seeds"
            items.append(
                f"{rough}, how much chance in initialisation and order matters is "
                f"{'not' if seeds == 1 else 'hardly'} known. The intervals take the trained networks as given: they "
                f"tell of other {voice}s, not of other seeds."
            )
        widths = [number(run.setting("network.width")) or 1 for group in self.main for run in group.runs]
        if widths and max(widths) < 1:
            items.append(
                f"The networks are {max(widths):g} times as wide as the paper's (WASPAA 2023) and trained in another "
                "way."
            )
        return f"<ul>{''.join(f'<li>{escaped(item)}</li>' for item in items)}</ul>" if items else ""

    # Tables

    def headline(self) -> str:
        if not self.main:
            return ""
        columns: list[tuple[str, str, Callable[[_Row], str]]] = [
            ("Setting", "name", lambda row: row["name"]),
            ("Starts from", "start", lambda row: row["start"]),
            ("Anti-transfer", "anti_transfer", lambda row: row["anti_transfer"]),
            ("Accuracy ± sd, %", "accuracy", _accuracy),
            ("95 % interval", "accuracy_low", _interval),
            ("UA, %", "uar", lambda row: percent(row["uar"])),
            ("Difference [95 %], points", "difference", _difference),
            ("Withheld, %", "withheld_accuracy", lambda row: percent(row["withheld_accuracy"])),
            ("Short\N{SOFT HYPHEN}cut, %", "shortcut_rate", lambda row: percent(row["shortcut_rate"])),
            ("Voice probe, %", "voice_probe", lambda row: percent(row["voice_probe"])),
            ("Word probe, %", "word_probe", lambda row: percent(row["word_probe"])),
            ("Average precision", "average_precision", lambda row: decimal(row["average_precision"])),
        ]
        shown = [column for column in columns if self.results[column[1]].notna().any()]
        caption = (
            f"{self.conditions()} Accuracy: mean ± standard deviation over seeds. Intervals: 95 %, by bootstrap over "
            f"{self.voice}s with the seeds pooled. A dash: not measured, or too few {self.voice}s or seeds."
        )
        body = [[cell(self.rows[group.name]) for *_, cell in shown] for group in self.main]
        return self.findings() + self.tabulate([name for name, *_ in shown], body, caption, words=3)

    def pretrained(self) -> str:
        if not self.others:
            return ""
        head = ["Network", "Task", "Classes", "Accuracy, %", "UA, %", "Average precision", "Reconstruction", "Constant"]
        body = []
        for group in self.others:
            row = self.rows[group.name]
            live = group.mean(lambda run: run.score("test", "live_channels"))
            body.append(
                [
                    group.name,
                    str(TASKS.get(row["task"], row["task"])),
                    count(len(group.first.true_classes)) if group.first.classes else "–",
                    _accuracy(row),
                    percent(row["uar"]),
                    *(decimal(row[column]) for column in ("average_precision", "reconstruction", "constant")),
                    "–" if live is None else f"{live:g} of 4",
                ]
            )
        caption = (
            f"{self.mark}. Networks trained beforehand, each on its own test part. Reconstruction is RH-Emo's binary "
            "cross-entropy; it must be below that of the best constant. A live channel of its embedding is one that "
            "varies."
        )
        return self.tabulate([*head, "Live channels"], body, caption, words=2)

    def stages(self) -> str:
        stages = [stage for stage in self.demo.get("stages") or [] if isinstance(stage, dict)]
        seconds = [number(stage.get("seconds")) or 0.0 for stage in stages]
        if not sum(seconds):
            return ""
        body = [
            [
                str(stage.get("name", "–")),
                bar(time / sum(seconds)),
                duration(time),
                memory(number(stage.get("peak_memory"))),
            ]
            for stage, time in zip(stages, seconds, strict=True)
        ]
        body.append(["all stages", "", duration(sum(seconds)), "–"])
        caption = f"The stages of the whole job in their order, on {self.devices}."
        return self.tabulate(["Stage", "Share of the time", "Time", "Peak memory"], body, caption, words=2)

    def resources(self) -> str:
        head = ["Network", "Parameters", "Epochs", "Kept epoch", "Seconds per epoch", "Time of a run", "Peak memory"]
        body = [
            [
                row["name"],
                *(count(row[column]) for column in ("parameters", "epochs", "kept_epoch")),
                "–" if row["epoch_seconds"] != row["epoch_seconds"] else f"{row['epoch_seconds']:.3g}",
                duration(row["seconds"]),
                memory(row["peak_memory"]),
            ]
            for row in self.rows.values()
        ]
        caption = (
            f"On {self.devices}. Parameters without the frozen twin; times and epochs are means over seeds, memory "
            "is the highest. On a CPU it is the most that the process had held by then, with whatever it did before."
        )
        return self.tabulate(head, body, caption, words=1)

    def provenance(self) -> str:
        facts = made_with(self.runs)
        if self.demo.get("recipe"):
            facts.append(["recipe", str(self.demo["recipe"])])
        body = self.tabulate(["What", "Which"], facts, "What the runs were made with.", words=2)
        body += "<p>Settings of the first seed; what differs in another stands beside its folder.</p>"
        for group in self.groups:
            settings = group.first.result.get("experiment") or {}
            shown = json.dumps(settings, indent=1, ensure_ascii=False)
            common, items = flatten(settings), []
            for run in group.runs:
                own = flatten(run.result.get("experiment") or {})
                changed = {key: own.get(key) for key in {**common, **own} if own.get(key) != common.get(key)}
                differs = f": {json.dumps(changed, ensure_ascii=False)}" if changed else ""
                items.append(
                    f"<li>seed {escaped(run.seed)}, "
                    f"<code>{escaped(run.folder.relative_to(self.folder))}</code>{escaped(differs)}</li>"
                )
            content = f"<ul>{''.join(items)}</ul><pre>{escaped(shown)}</pre>"
            body += folded(group.name, content, seed_count([len(group.runs)]))
        return body

    # Figures

    def dots(self) -> str:
        classes = len(self.main[0].first.true_classes) if self.main else 0
        guess = 1 / classes if classes else None
        probe = next(
            (chance for g in self.main for chance in g.values(lambda r: number(r.analysis.get("voice_probe_chance")))),
            None,
        )
        measures = [
            Measure(f"accuracy, {'unseen' if self.unseen else 'test'} {self.voice}s", _scored("test"), guess),
            Measure("accuracy, withheld", _scored("withheld"), guess),
            Measure("shortcut rate", lambda run: number(run.analysis.get("shortcut_rate"))),
            Measure("voice probe", lambda run: number(run.analysis.get("voice_probe")), probe),
        ]
        shown = [measure for measure in measures if any(group.values(measure.of) for group in self.main)]
        if not shown:
            return ""
        caption = (
            f"{self.conditions()} Dots: mean over seeds; ticks: single seeds; bars: 95 % interval of accuracy over "
            f"{self.voice}s. Blue: with anti-transfer, hollow where the twin is random; grey: without. Dashed: "
            "guessing. A line across parts settings with other initial weights."
            + (" Right of accuracy, what anti-transfer is to lower: shortcut rate and probe." if len(shown) > 2 else "")
        )
        return self.figure(figures.dots(self.main, self.table, shown), caption)

    def differences(self) -> str:
        table = self.paired[self.paired["low"].notna()]
        if table.empty:
            return ""
        measures = {name: title for name, title in MEASURES.items() if (table["measure"] == name).any()}
        groups = [group for group in self.main if (table["name"] == group.name).any()]
        seeds = seed_count(table["seeds"])
        caption = (
            f"{self.mark}. Mean difference between trainings of the same seed, in points, and its 95 % interval over "
            f"{seeds} (paired t). Blue: against the same setting without anti-transfer; red, hollow: against the same "
            "setting with a random twin. Right is more: good for accuracy, bad for the shortcut rate."
        )
        return (
            self.verdicts(table, measures)
            + self.figure(figures.differences(groups, table, measures), caption)
            + self.differences_table(table, measures)
        )

    def verdicts(self, table: pd.DataFrame, measures: Mapping[str, str]) -> str:
        """One sentence a measure: how many differences there are, and which can be told from chance."""
        items = []
        for (against, measure), rows in table.groupby(["against", "measure"], sort=False):
            clear = rows[(rows["low"] > 0) | (rows["high"] < 0)]
            sure = rows[rows["q"] < 0.05]
            text = (
                f"against {'no anti-transfer' if against == 'baseline' else 'a random twin'}: "
                f"{len(clear)} of {count(len(rows), 'interval')} without 0, where chance alone gives "
                f"{0.05 * len(rows):.1f}; {len(sure)} with a false discovery rate below 5 %."
            )
            named = "; ".join(
                f"{row['name']} {points(row['mean'], row['low'], row['high'])}"
                for row in records(sure.sort_values("p"))[:8]
            )
            items.append(
                f"<li><strong>{escaped(measures[str(measure)])}</strong> {escaped(text)}"
                f"{f' {escaped(named)}.' if named else ''}</li>"
            )
        return f"<ul>{''.join(items)}</ul>"

    def differences_table(self, table: pd.DataFrame, measures: Mapping[str, str]) -> str:
        cells = {
            (row["name"], row["against"], row["measure"]): (
                f"{points(row['mean'], row['low'], row['high'])} "
                f"{row['rose']:.0f}↑ {row['fell']:.0f}↓{'*' if row['q'] < 0.05 else ''}"
            )
            for row in records(table)
        }
        pairs = table[["name", "against", "other"]].drop_duplicates().itertuples(index=False)
        body = [
            [name, other, *(cells.get((name, against, measure), "–") for measure in measures)]
            for name, against, other in pairs
        ]
        caption = (
            "The same in figures: points, 95 % interval over seeds, seeds in which it rose and fell. *: false "
            "discovery rate below 5 % among all comparisons of the same kind and measure (Benjamini-Hochberg). "
            "differences.csv has p and q of each."
        )
        return self.tabulate(["Setting", "Minus", *measures.values()], body, caption, words=2)

    def curves(self) -> str:
        body = ""
        for groups, what in ((self.main, "Classifiers"), (self.others, "Networks trained beforehand")):
            logged = [
                g for g in groups if any(run.metrics is not None and "train_total" in run.metrics for run in g.runs)
            ]
            if not logged:
                continue
            caption = (
                f"{self.mark}. {what}: loss by epoch, one line a seed. Total is what is minimised; dotted, where it "
                "differs, cross-entropy alone. Dots: the epoch whose weights are kept. Dropout is on while "
                "training losses are taken, so they may lie above those of validation."
            )
            if any(group.first.task == "rhemo" for group in logged):
                caption += " Dashed: RH-Emo's loss if it reconstructed the best constant."
            body += self.figure(figures.losses(logged, share=groups is self.main), caption, logged)
            judged = [
                g
                for g in logged
                if any("validation_accuracy" in run.metrics for run in g.runs if run.metrics is not None)
            ]
            if judged and groups is self.main:
                caption = (
                    f"{self.mark}. Accuracy on the validation part by epoch, one line a seed. Dots: the epoch whose "
                    "weights are kept. Results above are those of the test part, which chooses nothing."
                )
                body += self.figure(figures.accuracies(judged), caption, judged)
        return body

    def confusions(self) -> str:
        groups = [group for group in self.main if figures.confusion(group) is not None]
        if not groups:
            return ""
        caption = (
            f"{self.conditions()} Rows: the true class; columns: the answer. Each cell: clips, summed over seeds, "
            "and their share of the row. The diagonal is right."
        )
        return self.figure(figures.confusions(groups), caption, groups)

    def similarity(self) -> str:
        groups = [group for group in self.main if any(figures.similarity(run) for run in group.runs)]
        if not groups:
            return ""
        caption = (
            "Squared cosine of the Gram matrices of the network in training and its frozen twin at the AT layer, on "
            "the validation part after each epoch (the training part where that was not logged), one line a seed, "
            "logarithmic. 1: the same correlations of channels; 0: none in common. With beta 0 it is only watched."
        )
        note = (
            '<p class="note"><strong>How to read it.</strong> '
            "A Gram matrix of channels depends on which channel is which, and "
            "two networks that began from unrelated random weights share none. Their similarity is small from the "
            "start and vanishes within an epoch without any change in what the features tell: a linear probe reads "
            "off as much as before. <strong>From random initialisation, a vanishing similarity is no evidence that "
            "anything was removed.</strong> It means more where training starts from the twin itself; and there, "
            "too, the probe, the shortcut rate and the withheld clips say what anti-transfer really did.</p>"
        )
        return self.figure(figures.similarities(groups), caption, groups) + note


def _scored(part: str) -> Callable[[Run], float | None]:
    return lambda run: run.score(part, "accuracy")


def _accuracy(row: _Row) -> str:
    return f"{percent(row['accuracy'])}{plus_minus(row['accuracy_sd'])}"


def _interval(row: _Row) -> str:
    return interval(row["accuracy_low"], row["accuracy_high"])


def _difference(row: _Row) -> str:
    return points(row["difference"], row["difference_low"], row["difference_high"])
