"""The report of a grid: the paper's table 1 and figure 2 from its trainings, beside what the paper has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qat.config import flatten
from qat.files import replacing
from qat.report import figures
from qat.report.figures import Line
from qat.report.page import (
    Html,
    Page,
    count,
    decimal,
    duration,
    escaped,
    folded,
    folder_beside,
    interval,
    memory,
    percent,
    plus_minus,
    points,
    records,
    seed_count,
    signed,
)
from qat.results import paper
from qat.results.paper import METHODS, Grid, Setting
from qat.results.runs import POSITIONS, TASKS, Group, Run, made_with, number

if TYPE_CHECKING:
    import pandas as pd

_NAMES = {"iemocap": "IEMOCAP", "ravdess": "RAVDESS", "tess": "TESS"}
_KINDS = {
    "paper": "the paper's corpora",
    "recorded": "other recorded speech",
    "synthesised": "synthesised speech",
}
_COSTS = {"epoch_seconds": "time per epoch", "peak_memory": "peak memory"}
_Row = dict[str, Any]


def write_grid_report(folder: Path, out: Path) -> Path:
    """Write the report of a grid, finished or not, with its tables and figures in a folder beside it.

    The file needs nothing else: no script, no network, figures inside. The same runs give the same bytes.

    Args:
        folder: of ``qat grid``, with ``plan.csv``.
        out: the HTML file.

    Returns:
        The HTML file. `folder_beside` it has ``table1.csv``, ``gains.csv``, ``layers.csv``, ``figure2.csv``,
        ``resources.csv``, ``ratios.csv`` and ``summary.csv``, whose columns `qat.results.paper` explains, and every
        figure as SVG and PNG.

    Raises:
        ValueError: as `Grid.read`.
    """
    page = _GridPage(Grid.read(Path(folder)))
    text = page.html()
    for name, table in page.listed().items():
        with replacing(folder_beside(out) / f"{name}.csv") as draft:
            table.to_csv(draft, index=False)
    page.write(out, text)
    return out


def read_table1(out: Path) -> pd.DataFrame:
    """Table 1 as `write_grid_report` wrote it beside the page ``out``; None where there is nothing."""
    import pandas as pd

    whole = dict.fromkeys(("layer", "seeds", "speakers", "gain_seeds", "test_layer", "paper_layer"), "Int64")
    table = pd.read_csv(folder_beside(out) / "table1.csv", dtype=whole)
    return table.astype(object).where(table.notna(), None)


def short_table(table: pd.DataFrame) -> list[_Row]:
    """Table 1 as a terminal has room for it: accuracy in percent and the layer; finished trainings where it is empty.

    Args:
        table: of `read_table1`.
    """
    rows: dict[tuple[str, ...], _Row] = {}
    for row in records(table):
        network = "quat" if row["network"] == "quaternion" else row["network"]
        cell = {"corpus": row["corpus"], "network": network, "split": row["split"]}
        line = rows.setdefault(_key(row), cell)
        empty = row["accuracy"] is None
        shown = f"{row['finished']} of {row['planned']}" if empty else _at_layer(row["accuracy"], row["layer"])
        line[METHODS.get(row["at"], row["at"])] = shown
    return list(rows.values())


class _GridPage(Page):
    """The sections."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.summary, self.layers = paper.summary(grid), paper.layers(grid)
        self.table = paper.table1(grid)
        self.costs = paper.resources(grid)
        self.ratios = paper.ratios(self.costs)
        self.kinds = {corpus: grid.kind(corpus) for corpus in grid.corpora}
        self.of_kind = {kind: [c for c, k in self.kinds.items() if k == kind] for kind in _KINDS}
        self.of_kind = {kind: corpora for kind, corpora in self.of_kind.items() if corpora}
        self.methods = [at for at in METHODS if (self.table["at"] == at).any()]
        self.chosen = {(*one.chosen.cell, one.chosen.at): one.chosen for one in paper.choices(grid)}
        asked = grid.folder / "campaign.yaml"
        self.asked = asked.read_text(encoding="utf-8") if asked.is_file() else ""

    def html(self) -> str:
        sections = [
            ("What is real, and what is there", self.real()),
            ("Table 1", self.findings() + self.table1()),
            ("What is missing", self.missing()),
            ("Average gains by anti-transfer", self.gains()),
            ("Accuracy by layer", self.figure2() + self.by_corpus()),
            ("Every cell of table 1", self.cells() + self.recalls()),
            ("Training curves", self.curves()),
            ("Confusion matrices", self.confusions()),
            ("Networks trained beforehand", self.beforehand()),
            ("Time and memory", self.time_and_memory()),
            ("What this cannot show", self.limits()),
            ("Provenance and settings", self.corpora() + self.provenance()),
        ]
        label = ""
        if synthetic := self.of_kind.get("synthesised"):
            label = (
                '<p class="label"><strong>Synthesised speech.</strong> Every accuracy on '
                f"{self.listing(synthetic)} was measured on synthesised speech, not on human recordings: none compares "
                "with the paper's, and none stands beside them.</p>"
            )
        return self.document("Report on a grid: table 1 and figure 2", sections, label)

    def listed(self) -> dict[str, pd.DataFrame]:
        """The tables that are written beside the page."""
        import pandas as pd

        kinds = self.of_kind.items()
        means = [self.mean_gains(corpora).assign(corpora="+".join(corpora)) for _, corpora in kinds]
        lines = [paper.figure2(self.of(self.layers, corpora)) for _, corpora in kinds]
        return {
            "table1": self.table,
            "gains": pd.concat(means) if means else pd.DataFrame(),
            "layers": self.layers,
            "figure2": pd.concat(lines) if lines else pd.DataFrame(),
            "resources": self.costs,
            "ratios": self.ratios,
            "summary": self.summary,
        }

    # Words

    def called(self, corpus: str) -> str:
        name = _NAMES.get(corpus, corpus)
        return f"{name} (synthesised)" if self.kinds.get(corpus) == "synthesised" else name

    def listing(self, corpora: Iterable[str]) -> str:
        return ", ".join(escaped(self.called(corpus)) for corpus in corpora)

    def real(self) -> str:
        grid = self.grid
        seeds = sorted({run.seed for run in grid.runs if run.seed is not None})
        plural = "the seeds" if len(seeds) > 1 else "the seed"
        preset = (yaml.safe_load(self.asked) or {}).get("preset") if self.asked else None
        text = (
            f"{f'Preset {preset}. ' if preset else ''}{count(grid.finished)} of {count(grid.planned, 'training')} "
            f"{'are' if grid.finished != 1 else 'is'} finished"
            f"{f', with {plural} {_numbers(seeds)}' if seeds else ''}."
        )
        if grid.finished < grid.planned:
            text += " What follows is of these, and changes with what is still missing."
        items = []
        for kind, corpora in self.of_kind.items():
            said = {
                "paper": "recorded speech, by the name of the corpus; qat corpus check tells whether its files are the "
                "published ones. Its accuracies stand beside the paper's; how far the settings are the paper's, the "
                "last section tells.",
                "recorded": "recorded speech that the paper does not have; nothing of it stands beside the paper's.",
                "synthesised": "synthesised speech. No number of it compares with the paper's.",
            }[kind]
            items.append(f"<li><strong>{self.listing(corpora)}</strong>: {said}</li>")
        made_up = sorted(
            {
                setting.stage
                for setting in grid.settings
                if setting.stage != "emotion"
                for run in setting.group.runs
                if run.setting("corpus.name") == "demo"
            }
        )
        if made_up and set(self.kinds.values()) != {"synthesised"}:
            items.append(
                f"<li>What was trained beforehand ({', '.join(made_up)}) learnt from <strong>synthesised "
                "speech</strong>; the results on recorded speech build on it.</li>"
            )
        return f"<p>{escaped(text)}</p><ul>{''.join(items)}</ul>"

    def corpora(self) -> str:
        places: dict[tuple[str, str], list[Setting]] = {}
        for setting in self.grid.settings:
            what = self.called(setting.corpus) if setting.stage == "emotion" else setting.network
            places.setdefault((setting.stage, what), []).append(setting)
        body = []
        for (stage, what), settings in places.items():
            runs = [run for setting in settings for run in setting.group.runs]
            names = sorted({str(run.setting("corpus.name", "")) for run in runs} - {""})
            speech = {"synthesised" if name == "demo" else "recorded" for name in names}
            speakers = sorted({str(run.setting("split.rule", "")) for run in runs} - {""})
            planned = sum(setting.planned for setting in settings)
            body.append(
                [
                    stage,
                    what or "–",
                    ", ".join(names) or "–",
                    " and ".join(sorted(speech)) or "not known yet",
                    ", ".join(speakers) or "–",
                    f"{len(runs)} of {planned}",
                ]
            )
        caption = (
            "What each stage read, as its finished runs say themselves (corpus.name): the demo corpus is synthesised, "
            "csv is a manifest of recordings of your own, the others are published recordings. Trainings that are the "
            "same for several rows count in each."
        )
        head = ["Stage", "Corpus or network", "Read as", "Speech", "Split rules", "Finished"]
        return self.tabulate(head, body, caption, words=5)

    def missing(self) -> str:
        """The trainings that are not finished, and why, where that is known."""
        grid = self.grid
        if grid.finished == grid.planned:
            return ""
        body = self.rows(lambda row: f"{row['finished']} of {row['planned']}")
        caption = (
            "Finished trainings of each cell of table 1, over its layers and seeds. Table 1 and what follows show a "
            "cell with some of them by the best of these layers."
        )
        content = self.tabulate(["Corpus", "Network, split", *self.heads()], body, caption, words=2)
        items = [f"<li>{escaped(name)}: <code>{escaped(line)}</code></li>" for name, line in grid.failed.items()]
        if items:
            content += (
                f"<details><summary>{count(len(items), 'training')} failed</summary><ul>{''.join(items)}</ul></details>"
            )
        return content

    def conventions(self) -> str:
        """Which features a layer's number stands for, and what accuracy is where it is not over clips."""
        used = sorted({run.setting("anti_transfer.position", "relu") for run in self.grid.runs if run.layers})
        what = " or ".join(f"{name} ({POSITIONS.get(name, name)})" for name in used)
        text = f"Layer n is convolution n, with anti_transfer.position {what}." if used else ""
        if any(run.setting("training.accuracy") == "batches" for run in self.grid.runs):
            text += (
                " Accuracies are means over batches (training.accuracy batches), which a last, short batch distorts; "
                "intervals and gains are over clips."
            )
        return text.strip()

    def findings(self) -> str:
        items = []
        for kind, corpora in self.of_kind.items():
            table = self.of(self.table, corpora)
            judged = table[table["gain"].notna()]
            if judged.empty:
                continue
            sure = judged[judged["gain_low"].notna()]
            clear = sure[(sure["gain_low"] > 0) | (sure["gain_high"] < 0)]
            text = (
                f"{(judged['gain'] > 0).sum()} of {count(len(judged), 'cell')} with anti-transfer "
                f"{'are' if len(judged) != 1 else 'is'} above the baseline of their row, {(judged['gain'] < 0).sum()} "
                "below."
            )
            if len(sure):
                text += (
                    f" {len(clear)} of {count(len(sure), 'interval')} of these gains over speakers "
                    f"{'do' if len(sure) != 1 else 'does'} not hold 0, where chance alone gives {0.05 * len(sure):.1f}."
                )
            beside = table[table["difference"].notna()]
            if len(beside):
                far = beside["difference"].abs().max()
                text += (
                    f" Against the paper: {signed(beside['difference'].mean())} points on average over "
                    f"{count(len(beside), 'cell')}, {percent(far)} at most."
                )
            items.append(f"<li><strong>{escaped(_KINDS[kind].capitalize())}.</strong> {escaped(text)}</li>")
        return f"<ul>{''.join(items)}</ul>" if items else ""

    def limits(self) -> str:
        grid, table = self.grid, self.table
        items = []
        if grid.finished < grid.planned:
            items.append(
                f"{count(grid.planned - grid.finished, 'training')} of {count(grid.planned)} "
                f"{'are' if grid.planned - grid.finished != 1 else 'is'} missing. A layer that is not finished cannot "
                "be chosen."
            )
        if synthetic := self.of_kind.get("synthesised"):
            items.append(
                f"{', '.join(map(self.called, synthetic))}: rules for pitch, rate and loudness make the emotions. "
                "Nothing of it carries over to human speech, or says whether the paper's results hold."
            )
        tried = self.layers[(self.layers["at"] != "none") & self.layers["accuracy"].notna()]
        most = tried.groupby([*paper.CELL, "at"]).size().max() if len(tried) else 0
        if most > 1:
            over = table["optimism"].where(table["at"] != "none").mean()
            text = (
                f"A cell with anti-transfer is the best of up to {most} trainings a seed, its baseline one: even of "
                f"{most} copies of the baseline, the best on the validation part would be above it there. The gain on "
                "the test part is freer of this, but only the baseline had no choice."
            )
            if over == over:
                text += (
                    f" Choosing by the test part itself would have given {percent(over)} points more on average, none "
                    "of them real."
                )
            items.append(text)
        if len(seeds := table["seeds"].dropna()):
            items.append(
                f"With {seed_count(seeds.astype(int))} a cell, "
                + (
                    "how much chance in initialisation and order matters is not known"
                    if seeds.max() == 1
                    else "the spread over seeds is itself rough"
                )
                + "; the paper gives one figure a cell, and no spread. Intervals are over test speakers and take the "
                "trained networks as given."
            )
        few = table[(table["speakers"].fillna(99) < 2) & table["accuracy"].notna()]
        if len(few):
            cells = dict.fromkeys(f"{self.called(row['corpus'])} {row['split']}" for row in records(few))
            items.append(f"One test speaker only, so no interval at all: {', '.join(cells)}.")
        actor = set(table.loc[(table["split"] == "actor") & table["accuracy"].notna(), "corpus"])
        known = {
            "tess": "TESS, actor split: one of its two speakers is the whole training part, the other validation and "
            "test. Accuracies about chance (14.3 %) are to be expected, and differences between them mean little; the "
            "layer is chosen on the very speaker of the test part.",
            "ravdess": "RAVDESS, actor split: the released code's test part is actor 24 alone, 60 clips; one clip is "
            "1.7 points.",
            "iemocap": "IEMOCAP, actor split: the test part is one session, two speakers; an interval over two hardly "
            "says more than how far they are apart.",
        }
        items += [text for corpus, text in known.items() if corpus in actor and self.kinds[corpus] == "paper"]
        widths = {number(run.setting("network.width")) or 1 for s in grid.emotion for run in s.group.runs}
        if widths and max(widths) < 1:
            items.append(f"The networks are {max(widths):g} times as wide as the paper's: other networks, in effect.")
        if (self.table["split"] == "random").any():
            items.append("Random split: every test speaker is in the training part, too.")
        if "paper" in self.of_kind:
            items.append(
                "The paper's text and its table 1 disagree on RAVDESS (mean gain 2.6 or 6.2 points); its batch size "
                "varied and its random splits cannot be drawn again, so that cells differ for reasons beyond chance."
            )
        return f"<ul>{''.join(f'<li>{escaped(item)}</li>' for item in items)}</ul>"

    # Tables

    def of(self, table: pd.DataFrame, corpora: Iterable[str]) -> pd.DataFrame:
        return table[table["corpus"].isin(list(corpora))]

    def heads(self) -> list[str]:
        return [METHODS[at] for at in self.methods]

    def rows(self, cell: Any, table: pd.DataFrame | None = None) -> list[list[str]]:
        """Rows of table 1: corpus, network, split, then ``cell`` of what each method gave."""
        rows: dict[tuple[str, ...], dict[str, str]] = {}
        for row in records(self.table if table is None else table):
            rows.setdefault(_key(row), {})[row["at"]] = cell(row)
        return [
            [self.called(corpus), f"{network}, {split}", *(found.get(at, "–") for at in self.methods)]
            for (corpus, network, split), found in rows.items()
        ]

    def table1(self) -> str:
        def cell(row: _Row) -> str:
            if row["accuracy"] != row["accuracy"]:
                return f"{row['finished']} of {row['planned']}"
            layer = f" ({row['layer']})" if row["layer"] else ""
            lines = [f"<strong>{percent(row['accuracy'])}</strong>{plus_minus(row['accuracy_sd'])}{layer}"]
            if row["accuracy_low"] == row["accuracy_low"]:
                lines.append(f"<small>{interval(row['accuracy_low'], row['accuracy_high'])}</small>")
            if row["paper_accuracy"] == row["paper_accuracy"]:
                lines.append(f"<small>paper {_at_layer(row['paper_accuracy'], row['paper_layer'])}</small>")
                lines.append(f"<small>{signed(row['difference'])}</small>")
            return Html("<br>".join(lines))

        body = self.rows(cell)
        sizes = {_key(row): row for row in records(self.table) if row["parameters"] == row["parameters"]}
        for line, key in zip(body, dict.fromkeys(map(_key, records(self.table))), strict=True):
            if key in sizes:
                theirs = sizes[key]["paper_parameters"]
                stated = f", paper {theirs:.1e}".replace(".0e", "e").replace("e+0", "e") if theirs == theirs else ""
                size = f"<small>{count(sizes[key]['parameters'])} parameters{stated}</small>"
                line[1] = Html(f"{escaped(line[1])}<br>{size}")
        seeds = self.table["seeds"].dropna().astype(int)
        caption = (
            f"Accuracy on the test part, %: mean ± standard deviation over {seed_count(seeds)}, in parentheses the "
            "layer, chosen by accuracy on the validation part (ties: the shallower); below, the 95 % interval "
            "over test speakers, seeds pooled, and, where the corpus is one of the paper's, its value (its layer) "
            f"and ours minus that, in points. {self.conventions()} S: against the network that tells speakers, W: words"
            "; SW: one after the other. 0 of n: no training of the cell is finished."
        )
        return self.tabulate(["Corpus", "Network, split", *self.heads()], body, caption, words=2)

    def mean_gains(self, corpora: Iterable[str]) -> pd.DataFrame:
        return paper.gains(self.of(self.table, corpora))

    def gains(self) -> str:
        content = ""
        for kind, corpora in self.of_kind.items():
            means = self.mean_gains(corpora)
            means = means[means["cells"] > 0]
            if means.empty:
                continue
            body = []
            for row in records(means):
                whole = row["cells"] == row["paper_cells"]
                body.append(
                    [
                        _NAMES.get(row["what"], row["what"]),
                        count(row["cells"]),
                        points(row["gain"]),
                        "–" if whole else points(row["paper_same"]),
                        points(row["paper_table"]),
                        points(row["paper_text"]),
                    ]
                )
            caption = (
                f"{_KINDS[kind].capitalize()} ({', '.join(map(self.called, corpora))}): mean over cells of the gain "
                "over the baseline of the same corpus, network and split, in points."
            )
            if kind == "paper":
                caption += (
                    " The paper's: recomputed from its table 1, over the same cells where ours lack some, and as its "
                    "text states them."
                )
            head = ["Cells with", "Cells", "Ours", "Paper's table, same cells", "Paper's table", "Paper's text"]
            content += self.tabulate(head, body, caption, words=1)
        return content

    def cells(self) -> str:
        """All about every cell of table 1, a table for each corpus."""
        columns: list[tuple[str, Any]] = [
            ("Network, split", lambda row: f"{row['network']},\N{NO-BREAK SPACE}{row['split']}"),
            ("AT", lambda row: METHODS.get(row["at"], row["at"]).replace(" ", "\N{NO-BREAK SPACE}")),
            ("Layer", lambda row: _whole(row["layer"])),
            ("Valida\N{SOFT HYPHEN}tion, %", lambda row: percent(row["validation_accuracy"])),
            ("Test ± sd, %", lambda row: f"{percent(row['accuracy'])}{plus_minus(row['accuracy_sd'])}"),
            ("Seeds", lambda row: _whole(row["seeds"])),
            ("95 % interval", lambda row: interval(row["accuracy_low"], row["accuracy_high"])),
            ("Gain [95 %]", lambda row: points(row["gain"], row["gain_low"], row["gain_high"])),
            ("By test (layer)", lambda row: _at_layer(row["test_accuracy"], row["test_layer"])),
            ("Opti\N{SOFT HYPHEN}mism", lambda row: points(row["optimism"]) if row["layer"] else "–"),
            ("Paper (layer)", lambda row: _at_layer(row["paper_accuracy"], row["paper_layer"])),
            ("Minus paper", lambda row: points(row["difference"])),
        ]
        content = ""
        for corpus in self.grid.corpora:
            table = self.of(self.table, [corpus])
            table = table[table["accuracy"].notna()]
            if table.empty:
                continue
            speakers, clips = table["speakers"].dropna(), table["clips"].dropna()
            caption = (
                f"{self.called(corpus)}: the test part has {_range(clips)} clips by {_range(speakers)} speakers. Gain: "
                "over no AT of the same network and split, paired over seeds and clips, with its interval over test "
                "speakers; a dash where there are fewer than two. By test: what choosing the layer by test accuracy "
                f"would have given, and how much more that is: optimism, not accuracy. {self.conventions()}"
            )
            body = [[cell(row) for _, cell in columns] for row in records(table)]
            content += self.tabulate([name for name, _ in columns], body, caption, words=2)
        return content

    def recalls(self) -> str:
        table = self.table[self.table["uar"].notna()]
        if table.empty:
            return ""
        body = self.rows(lambda row: f"{percent(row['accuracy'])} / {percent(row['uar'])}", table)
        caption = (
            "WA / UA of the test part, %: accuracy over clips, and the mean over classes of the share of each that is "
            "named rightly. Layers as in table 1."
        )
        return self.tabulate(["Corpus", "Network, split", *self.heads()], body, caption, words=2)

    def beforehand(self) -> str:
        body = []
        settings = {setting.name: setting for setting in self.grid.settings}
        for row in records(self.summary[(self.summary["stage"] != "emotion") & (self.summary["seeds"] > 0)]):
            first = settings[row["name"]].group.first
            body.append(
                [
                    row["name"],
                    TASKS.get(first.task, first.task),
                    str(first.setting("corpus.name", "–")),
                    count(len(first.classes)) if first.classes else "–",
                    f"{percent(row['accuracy'])}{plus_minus(row['accuracy_sd'])}",
                    percent(row["uar"]),
                    decimal(row["reconstruction"]),
                    decimal(row["constant"]),
                    count(row["epochs"]),
                    duration(row["seconds"]),
                ]
            )
        if not body:
            return ""
        caption = (
            "Each on its own test part. Reconstruction is RH-Emo's binary cross-entropy, which must be below that of "
            "the best constant."
        )
        head = ["Network", "Task", "Corpus", "Classes", "Accuracy, %", "UA, %", "Recon­struction", "Constant"]
        return self.tabulate([*head, "Epochs", "Time"], body, caption, words=3)

    # Figures

    def figure2(self) -> str:
        content = ""
        for kind, corpora in self.of_kind.items():
            table = paper.figure2(self.of(self.layers, corpora))
            panels: dict[str, list[Line]] = {}
            for network, own in table.groupby("network", sort=False):
                there = own["corpora"].iloc[0].split("+")
                title = f"{network}: {', '.join(map(self.called, there))}"
                panels[title] = [
                    _line(lines, str(split), str(at)) for (split, at), lines in own.groupby(["split", "at"], sort=False)
                ]
            if not panels:
                continue
            left = "; ".join(
                f"{network} without {', '.join(map(self.called, missing))}"
                for network, own in table.groupby("network", sort=False)
                if (missing := [c for c in corpora if c not in own["corpora"].iloc[0].split("+")])
            )
            nothing = [
                n for n in dict.fromkeys(self.of(self.layers, corpora)["network"]) if n not in set(table["network"])
            ]
            caption = (
                f"{'Figure 2 of the paper, with our trainings' if kind == 'paper' else 'The same of other corpora'}, "
                f"{_KINDS[kind]}: accuracy on the test part by layer of single anti-transfer, mean over the corpora "
                "named above each panel and over seeds. Thick: mean of the lines; dashed: no anti-transfer. Only "
                "corpora that have every training which a network's lines need, with one seed at least, are in it"
                f"{f': {left}' if left else ''}{''.join(f'; none yet for {network}' for network in nothing)}. "
                f"{self.conventions()}"
            )
            content += self.figure(figures.by_layer(panels, "accuracy, %"), caption, name=f"figure2-{kind}")
        return content or "<p>Figure 2 waits: no corpus has every single anti-transfer training and the baselines.</p>"

    def by_corpus(self) -> str:
        content = ""
        for corpus in self.grid.corpora:
            table = self.of(self.layers, [corpus])
            table = table[table["accuracy"].notna()]
            panels: dict[str, list[Line]] = {}
            for (network, split), own in table.groupby(["network", "split"], sort=False):
                lines = [_line(lines, "", str(at)) for at, lines in own.groupby("at", sort=False)]
                panels[f"{network}, {split} split"] = lines
            if not (table["layer"] > 0).any():
                continue
            guess = self.guess(corpus)
            caption = (
                f"{self.called(corpus)}: accuracy on the test part by layer of anti-transfer, mean over seeds. Rings: "
                "the layer that the validation part chose; dashed: no anti-transfer; dotted red: guessing. Layers that "
                f"are missing are not finished. {self.conventions()}"
            )
            content += self.figure(figures.by_layer(panels, "accuracy, %", guess), caption, name=f"layers-{corpus}")
        return content

    def guess(self, corpus: str) -> float | None:
        """What guessing gives, in percent; outputs that stand for no class do not count."""
        runs = [run for setting in self.grid.emotion if setting.corpus == corpus for run in setting.group.runs]
        counts = {len(run.true_classes) for run in runs}
        return 100 / counts.pop() if len(counts) == 1 and 0 not in counts else None

    def panels(self) -> dict[tuple[str, str], list[Group]]:
        """The runs of table 1 by corpus and split, with their curves and answers."""
        found: dict[tuple[str, str], list[Group]] = {}
        for (corpus, network, split, at), setting in self.chosen.items():
            name = f"{network}, {METHODS.get(at, at)}{f', layer {setting.layer}' if setting.layer else ''}"
            found.setdefault((corpus, split), []).append(Group(name, setting.whole.runs))
        return found

    def curves(self) -> str:
        content = ""
        for (corpus, split), groups in self.panels().items():
            logged = [group for group in groups if any(run.metrics is not None for run in group.runs)]
            if not logged:
                continue
            about = f"{self.called(corpus)}, {split} split, the runs of table 1, one line a seed"
            loss = (
                f"{about}: loss by epoch. Total is what is minimised; dotted, where it differs, cross-entropy alone. "
                "Dots: the epoch whose weights are kept."
            )
            accuracy = f"{about}: accuracy on the validation part by epoch."
            body = self.figure(figures.losses(logged, share=True), loss, logged, f"losses-{corpus}-{split}")
            body += self.figure(figures.accuracies(logged), accuracy, logged, f"validation-{corpus}-{split}")
            content += folded(f"{self.called(corpus)}, {split} split", body)
        return content

    def confusions(self) -> str:
        content = ""
        for (corpus, split), groups in self.panels().items():
            counted = [group for group in groups if figures.confusion(group) is not None]
            if not counted:
                continue
            caption = (
                f"{self.called(corpus)}, {split} split, the runs of table 1. Rows: the true class; columns: the "
                "answer. Each cell: clips of the test part, summed over seeds, and their share of the row."
            )
            body = self.figure(figures.confusions(counted), caption, counted, f"confusions-{corpus}-{split}")
            content += folded(f"{self.called(corpus)}, {split} split", body)
        return content

    def time_and_memory(self) -> str:
        if self.costs.empty:
            return ""
        devices = list(dict.fromkeys(self.costs["device"]))
        note = (
            "<p>As the runs measured it themselves: mean seconds of an epoch, without its validation, and the most "
            "memory (on a GPU that of PyTorch's allocator, on a CPU the process's with whatever it did before). "
            "Trainings that shared a device with other work were slower for it, and nothing here says which did.</p>"
        )
        return note + self.ratio_table() + "".join(map(self.ratio_figure, devices)) + self.cost_table()

    def ratio_table(self) -> str:
        body = []
        for (what, device, network), pairs in self.ratios.groupby(["what", "device", "network"], sort=False):
            adds = what == "AT / no AT"
            for measure, title in _COSTS.items():
                values = pairs[measure].dropna()
                if len(values):
                    stated = _times(paper.STATED_RATIOS[str(what), measure])
                    body.append(
                        [
                            f"{what}, {network} network" if adds else str(what),
                            title,
                            str(device),
                            f"at most {stated}" if adds and measure == "peak_memory" else stated,
                            _times(values.mean()),
                            f"×{values.min():.3g} to ×{values.max():.3g}",
                            count(len(values)),
                        ]
                    )
        if not body:
            return "<p>No two finished trainings on one device differ in network or anti-transfer alone.</p>"
        caption = (
            "Ratios of two settings that differ in this one thing, mean over all pairs of settings on the same device. "
            "The paper's: quaternion VGG16 against the real one; for anti-transfer the figures are an earlier paper's. "
            "Here, where the network's inputs are fixed, what the twin gives of a sample is computed once before "
            "training (anti_transfer.cache), and no epoch pays for it."
        )
        head = ["Ratio", "Of", "Device", "Paper", "Ours, mean", "From, to", "Pairs"]
        return self.tabulate(head, body, caption, words=3)

    def ratio_figure(self, device: str) -> str:
        pairs = self.ratios[(self.ratios["device"] == device) & (self.ratios["what"] == "AT / no AT")]
        panels = {
            title: [
                Line(str(network), str(network), dict(own.groupby("layer")[measure].mean()))
                for network, own in pairs[pairs[measure].notna()].groupby("network", sort=False)
            ]
            for measure, title in _COSTS.items()
        }
        panels = {title: lines for title, lines in panels.items() if lines}
        if not panels:
            return ""
        caption = (
            f"On {device}: what anti-transfer at each layer costs, as a multiple of the same training without it; mean "
            "over corpora, splits and kinds of anti-transfer."
        )
        return self.figure(figures.by_layer(panels, "times no AT"), caption, name=f"costs-{_slug(device)}")

    def cost_table(self) -> str:
        costs = self.costs[self.costs["stage"] == "emotion"]
        costs = costs.assign(kind=costs["at"].str.split("_").str[0])
        body = []
        for (device, network, kind, layer), own in costs.groupby(["device", "network", "kind", "layer"]):
            pairs = self.ratios[
                (self.ratios["what"] == "AT / no AT")
                & (self.ratios["device"] == device)
                & (self.ratios["network"] == network)
                & (self.ratios["layer"] == layer)
                & self.ratios["at"].str.startswith(str(kind))
            ]
            body.append(
                [
                    str(network),
                    "no AT" if kind == "none" else f"{kind} AT",
                    _whole(layer),
                    str(device),
                    _digits(own["epoch_seconds"].mean()),
                    _digits(pairs["epoch_seconds"].mean()),
                    memory(own["peak_memory"].max()),
                    _digits(pairs["peak_memory"].mean()),
                    count(own["epochs"].mean()),
                    count(own["seeds"].sum()),
                ]
            )
        caption = (
            "Means over the corpora, splits and seeds that are finished, memory the highest; times no AT: mean over "
            "those whose baseline ran on the same device. Of dual anti-transfer it is the second training. "
            "resources.csv has every setting."
        )
        head = ["Network", "AT", "Layer", "Device", "Seconds per epoch", "Times no AT", "Peak memory", "Times no AT"]
        return folded(
            "By network, anti-transfer and layer",
            self.tabulate([*head, "Epochs", "Trainings"], body, caption, words=2),
        )

    def provenance(self) -> str:
        runs = self.grid.runs
        content = ""
        if runs:
            content += self.tabulate(["What", "Which"], made_with(runs), "What the runs were made with.", words=2)
        if self.asked:
            content += folded("What was asked (campaign.yaml)", f"<pre>{escaped(self.asked)}</pre>")
        stages: dict[str, list[Run]] = {}
        for setting in self.grid.settings:
            stages.setdefault(f"{setting.stage} {setting.network}".strip(), []).extend(setting.group.runs)
        for stage, trained in stages.items():
            if trained:
                content += folded(stage, _settings(trained), count(len(trained), "training"))
        return content


def _settings(runs: Iterable[Run]) -> str:
    """The settings that all runs of a stage share, and the values of those that differ."""
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in flatten(run.result.get("experiment") or {}).items():
            values.setdefault(key, {})[json.dumps(value, ensure_ascii=False)] = None
    shared = "\n".join(f"{key}: {next(iter(found))}" for key, found in values.items() if len(found) == 1)
    varied = "".join(
        f"<li><code>{escaped(key)}</code>: {escaped(', '.join([*found][:8]))}"
        f"{f' and {len(found) - 8} more' if len(found) > 8 else ''}</li>"
        for key, found in values.items()
        if len(found) > 1
    )
    return f"<pre>{escaped(shared)}</pre>{f'<p>What differs:</p><ul>{varied}</ul>' if varied else ''}"


def _line(table: pd.DataFrame, split: str, at: str) -> Line:
    """The accuracies of one method, in percent; without anti-transfer the level."""
    label = f"{METHODS.get(at, at)}{f', {split}' if split else ''}"
    hollow = split == "actor"
    if at == "none":
        return Line(label, at, 100 * table["accuracy"].iloc[0], hollow)
    chosen = table.loc[table["chosen"], "layer"] if "chosen" in table else ()
    values = {int(layer): 100 * value for layer, value in zip(table["layer"], table["accuracy"], strict=True)}
    return Line(label, at, values, hollow, int(next(iter(chosen))) if len(chosen) else None)


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["corpus"], row["network"], row["split"]


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values))


def _at_layer(accuracy: float, layer: Any) -> str:
    return percent(accuracy) + (f" ({int(layer)})" if _whole(layer) != "–" else "")


def _whole(value: Any) -> str:
    """A number that may be absent; layer 0 is none."""
    import pandas as pd

    return "–" if pd.isna(value) or value == 0 else str(int(value))


def _range(values: pd.Series) -> str:
    if not len(values):
        return "an unknown number of"
    low, high = count(values.min()), count(values.max())
    return low if low == high else f"{low} to {high}"


def _times(ratio: float) -> str:
    return f"×{ratio:.3g} ({100 * (ratio - 1):+.1f} %)".replace("-", "−")


def _digits(value: float) -> str:
    return "–" if value != value else f"{value:.3g}"


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
