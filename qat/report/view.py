"""What the sections of a report share: the runs of a folder, grouped, named and described."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from qat.config import Experiment
from qat.config.preset import METHODS
from qat.report.figures import Drawing
from qat.report.page import at_layer, count, folder_beside, records, span
from qat.results import paper
from qat.results.paper import PaperGrid, of_corpora
from qat.results.runs import POSITIONS, FinishedRun, Group, RunsFolder, devices, group_runs
from qat.results.tables import seed_differences, summary_table

KINDS = {"paper": "the paper's corpora", "recorded": "other recorded speech", "synthesised": "synthesised speech"}

_NAMES = {"iemocap": "IEMOCAP", "ravdess": "RAVDESS", "tess": "TESS"}
_SHARED: dict[str, Callable[[Experiment], Any]] = {
    "beta": lambda experiment: experiment.anti_transfer.beta,
    "anti-transfer loss": lambda experiment: experiment.anti_transfer.loss,
    "learning rate": lambda experiment: experiment.training.lr,
    "batch": lambda experiment: experiment.training.batch,
    "maximum epochs": lambda experiment: experiment.training.epochs,
    "patience": lambda experiment: experiment.training.patience,
    "width": lambda experiment: experiment.network.width,
    "initialisation": lambda experiment: experiment.network.init,
    "precision": lambda experiment: experiment.training.precision,
}


class Panel(NamedTuple):
    """Settings that one figure compares.

    Args:
        title: title of the folded part; empty where there is only one panel.
        about: beginning of captions: conditions of the measurement.
        slug: suffix of file names.
        groups: settings.
    """

    title: str
    about: str
    slug: str
    groups: list[Group]


def read_view(folder: Path) -> View:
    """The view of a folder; a `GridView` if its plan is the paper's grid or a part of it.

    Raises:
        ValueError: as `RunsFolder.read`; or nothing of its plan is finished, and the plan is no grid.
    """
    runs = RunsFolder.read(folder)
    if grid := PaperGrid.of(runs):
        return GridView(runs, grid)
    if not runs.runs:
        raise ValueError(f"{folder}: no training of plan.csv is finished; a report needs at least one")
    return View(runs)


class View:
    """A folder of runs as its sections see it.

    Attributes:
        folder: the folder.
        runs: its finished runs.
        main: settings that are compared: emotion networks, or all classifiers if there are none.
        others: networks that were trained beforehand.
    """

    is_grid = False

    def __init__(self, folder: RunsFolder) -> None:
        self.folder, self.runs = folder, folder.runs
        groups = group_runs(folder.runs)
        emotion = [group for group in groups if group.first.task == "emotion"]
        self.main = emotion or [group for group in groups if group.first.task != "rhemo"]
        self.others = [group for group in groups if group not in self.main]

    # Tables, each computed at its first use

    @cached_property
    def table(self) -> pd.DataFrame:
        """`summary_table` by name."""
        return summary_table(self.runs).set_index("name", drop=False)

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in records(self.table)}

    @cached_property
    def results(self) -> pd.DataFrame:
        """The rows of `main`."""
        return self.table.loc[[group.name for group in self.main]]

    @cached_property
    def paired(self) -> pd.DataFrame:
        return seed_differences(self.runs)

    def tables(self, out: Path) -> dict[Path, pd.DataFrame]:
        """The tables that are written beside the page."""
        return {out.with_name("summary.csv"): self.table, out.with_name("differences.csv"): self.paired}

    def terminal(self, short: bool) -> dict[str, Any]:
        """Tables for a terminal; ``short``: as little as a person needs."""
        return {"summary": self.table.reset_index(drop=True)}

    # Words

    @property
    def title(self) -> str:
        return f"Report on {self.corpus}"

    @property
    def label(self) -> str:
        """A warning above everything else."""
        return f"Every accuracy below was measured on {self.corpus}, not on human recordings." if self.synthetic else ""

    @cached_property
    def synthetic(self) -> bool:
        """Whether every result is from the demo corpus."""
        runs = [run for group in self.main for run in group.runs] or self.runs
        return {run.experiment.corpus.name for run in runs} == {"demo"}

    @cached_property
    def corpus(self) -> str:
        names = sorted({run.experiment.corpus.name for run in self.runs})
        about = str(self.folder.requested.get("about") or ", ".join(map(self.called, names)))
        return f"synthesised speech ({about})" if self.synthetic and "synthesised" not in about else about

    @property
    def mark(self) -> str:
        return f"{self.corpus[:1].upper()}{self.corpus[1:]}"

    @property
    def unseen(self) -> bool:
        """Whether no test speaker is in the training part."""
        return {run.experiment.split.rule for group in self.main for run in group.runs} <= {"speaker", "confounded"}

    @property
    def devices(self) -> str:
        return devices(self.runs)

    @property
    def guessing(self) -> float | None:
        """Accuracy of guessing, in percent."""
        return guess(run for group in self.main for run in group.runs)

    @property
    def conditions(self) -> str:
        """Conditions of the accuracies: corpus, speakers, clips and seeds."""
        clips, speakers = self.results["clips"].max(), self.results["speakers"].max()
        of = f" of {count(clips, 'clip')}" if clips == clips else ""
        by = f" by {count(speakers, 'speaker')}" if speakers == speakers else ""
        unseen = " that the training part does not have" if by and self.unseen else ""
        return f"{self.mark}: test part{of}{by}{unseen}; {span(self.results['seeds'], 'seed')} per setting."

    def called(self, corpus: str) -> str:
        return _NAMES.get(corpus, corpus)

    # What figures show

    @property
    def panels(self) -> list[Panel]:
        return [Panel("", self.conditions, "", self.main)] if self.main else []

    def charts(
        self, shows: Callable[[Group], object], draw: Callable[[list[Group]], Drawing]
    ) -> list[tuple[Panel, list[Group], Drawing]]:
        """A figure of each panel, with the settings for which ``shows`` is true."""
        chosen = ((panel, list(filter(shows, panel.groups))) for panel in self.panels)
        return [(panel, groups, draw(groups)) for panel, groups in chosen if groups]

    @property
    def bundles(self) -> dict[str, list[FinishedRun]]:
        """Runs whose settings are listed together, by title."""
        return {group.name: group.runs for group in (*self.others, *self.main)}


class GridView(View):
    """A grid as its sections see it; of each cell of table 1, the setting with the chosen layer.

    Attributes:
        grid: the grid.
    """

    is_grid = True
    title = "Report on a grid: table 1 and figure 2"

    def __init__(self, folder: RunsFolder, grid: PaperGrid) -> None:
        super().__init__(folder)
        self.grid = grid
        self.others = [setting.group for setting in grid.settings if setting.stage != "emotion" and setting.group.runs]
        self.main = [group for panel in self.panels for group in panel.groups]

    @cached_property
    def table1(self) -> pd.DataFrame:
        return paper.table1(self.grid)

    @cached_property
    def layers(self) -> pd.DataFrame:
        return paper.layers(self.grid)

    @cached_property
    def costs(self) -> pd.DataFrame:
        return paper.resources(self.grid)

    def tables(self, out: Path) -> dict[Path, pd.DataFrame]:
        kinds = self.kinds.values()
        means = [paper.gains(of_corpora(self.table1, corpora)).assign(corpora="+".join(corpora)) for corpora in kinds]
        tables = {
            "table1": self.table1,
            "gains": pd.concat(means),
            "layers": self.layers,
            "figure2": pd.concat([paper.figure2(of_corpora(self.layers, corpora)) for corpora in kinds]),
            "resources": self.costs,
            "ratios": paper.ratios(self.costs),
            "summary": paper.summary(self.grid),
        }
        return {folder_beside(out) / f"{name}.csv": table for name, table in tables.items()}

    def terminal(self, short: bool) -> dict[str, Any]:
        """Table 1; if ``short``, only accuracy in percent and layer, or the number of finished trainings."""
        synthesised = self.kinds.get("synthesised", [])
        if not short:
            return {"table1": self.table1.astype(object).where(self.table1.notna(), None), "synthesised": synthesised}
        head = ["corpus", "network", "split", *self.methods.values()]
        table = [
            dict(zip(head, (corpus, network.replace("quaternion", "quat"), split, *cells), strict=True))
            for corpus, network, split, *cells in self.by_cell(lambda row: at_layer(row["accuracy"], row["layer"]))
        ]
        notes = {"synthesised, not comparable with the paper": ", ".join(synthesised)} if synthesised else {}
        return {"table1": table, **notes}

    @property
    def label(self) -> str:
        corpora = self.listing(self.kinds.get("synthesised", []))
        text = "was measured on synthesised speech, not on human recordings, and cannot be compared with the paper's"
        return f"Every accuracy on {corpora} {text}." if corpora else ""

    def called(self, corpus: str) -> str:
        return f"{super().called(corpus)}{' (synthesised)' if self.grid.kind(corpus) == 'synthesised' else ''}"

    def listing(self, corpora: Iterable[str]) -> str:
        return ", ".join(map(self.called, corpora))

    @cached_property
    def panels(self) -> list[Panel]:
        """The settings of table 1 by corpus and split."""
        cells: dict[tuple[str, str], list[Group]] = {}
        for setting, _ in paper.choices(self.grid):
            name = f"{setting.network}, {METHODS[setting.at]}{f', layer {setting.layer}' if setting.layer else ''}"
            cells.setdefault((setting.corpus, setting.split), []).append(Group(name, setting.group.runs))
        return [
            Panel(title, f"{title}, the runs of table 1.", f"-{corpus}-{split}", groups)
            for (corpus, split), groups in cells.items()
            for title in [f"{self.called(corpus)}, {split} split"]
        ]

    @property
    def bundles(self) -> dict[str, list[FinishedRun]]:
        bundles: dict[str, list[FinishedRun]] = {}
        for setting in self.grid.settings:
            bundles.setdefault(f"{setting.stage} {setting.network}".strip(), []).extend(setting.group.runs)
        return bundles

    @cached_property
    def kinds(self) -> dict[str, list[str]]:
        """Corpora by their kind, see `KINDS`."""
        of_kind = {kind: [name for name in self.grid.corpora if self.grid.kind(name) == kind] for kind in KINDS}
        return {kind: corpora for kind, corpora in of_kind.items() if corpora}

    @cached_property
    def methods(self) -> dict[str, str]:
        """The methods in table 1, with their titles."""
        return {at: title for at, title in METHODS.items() if (self.table1["at"] == at).any()}

    def by_cell(self, cell: Callable[[dict[str, Any]], str]) -> list[list[str]]:
        """Rows of table 1: corpus, network, split, and for each method ``cell`` or the number of finished trainings."""
        rows: dict[tuple[str, str, str], dict[str, str]] = {}
        for row in records(self.table1):
            key = (row["corpus"], row["network"], row["split"])
            unfinished = f"{row['finished']} of {row['planned']}"
            rows.setdefault(key, {})[row["at"]] = unfinished if pd.isna(row["accuracy"]) else cell(row)
        return [[*key, *(of_method.get(at, "–") for at in self.methods)] for key, of_method in rows.items()]

    def cell_table(self, cell: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
        """`by_cell` as a table of the page."""
        return {
            "head": ["Corpus", "Network, split", *self.methods.values()],
            "body": [
                [self.called(corpus), f"{network}, {split}", *cells]
                for corpus, network, split, *cells in self.by_cell(cell)
            ],
        }

    def conventions(self) -> str:
        """Which features a layer's number stands for, and how accuracy is averaged if not over clips."""
        positions = sorted({run.twin.position for run in self.runs if run.twin})
        what = " or ".join(f"{name} ({POSITIONS[name]})" for name in positions)
        text = f"Layer n is convolution n, with anti_transfer.position {what}. " if positions else ""
        if any(run.experiment.training.accuracy == "batches" for run in self.runs):
            text += (
                "Accuracies are means over batches (training.accuracy batches), in which a short last batch counts too "
                "much; intervals and gains are over clips."
            )
        return text.strip()

    def common(self) -> str:
        """The settings that all trainings of table 1 share."""
        runs = [run for group in self.main for run in group.runs]
        shared = []
        for name, of in _SHARED.items():
            chosen = [run for run in runs if run.twin] if name in ("beta", "anti-transfer loss") else runs
            values = {str(of(run.experiment)) for run in chosen if isinstance(run.experiment, Experiment)}
            shared += [f"{name} {values.pop()}"] if len(values) == 1 else []
        return ", ".join(shared)


def guess(runs: Iterable[FinishedRun]) -> float | None:
    """Accuracy of guessing, in percent; unused outputs do not count."""
    counts = {len(run.true_classes) for run in runs}
    return 100 / counts.pop() if len(counts) == 1 and 0 not in counts else None
