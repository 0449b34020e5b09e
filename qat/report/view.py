"""What the sections of a report share: the runs of a folder, grouped, named and described."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.config import Experiment
from qat.report.page import count, records, span
from qat.results import paper
from qat.results.paper import METHODS, PaperGrid
from qat.results.runs import POSITIONS, FinishedRun, Group, RunsFolder, describe_loss, devices, group_runs
from qat.results.tables import seed_differences, summary_table

if TYPE_CHECKING:
    import pandas as pd

_NAMES = {"iemocap": "IEMOCAP", "ravdess": "RAVDESS", "tess": "TESS"}
KINDS = {"paper": "the paper's corpora", "recorded": "other recorded speech", "synthesised": "synthesised speech"}
_SHARED: dict[str, Callable[[Experiment], Any]] = {
    "beta": lambda one: one.anti_transfer.beta,
    "anti-transfer loss": lambda one: describe_loss(one.anti_transfer),
    "learning rate": lambda one: one.training.lr,
    "batch": lambda one: one.training.batch,
    "epochs at most": lambda one: one.training.epochs,
    "patience": lambda one: one.training.patience,
    "width": lambda one: one.network.width,
    "initialisation": lambda one: one.network.init,
    "precision": lambda one: one.training.precision,
}


class Panel(NamedTuple):
    """Settings that one figure compares.

    Args:
        title: title to fold them behind; empty where there is only one panel.
        about: beginning of a caption: what was judged, and on what.
        slug: end of a file's name.
        groups: the settings.
    """

    title: str
    about: str
    slug: str
    groups: list[Group]


class View:
    """A folder of runs as its sections see it.

    Attributes:
        folder: the folder. grid: its part of the paper's grid, if it is one.
        main: settings that are judged: emotion networks, or whatever classifiers there are.
        others: networks that were trained beforehand.
    """

    def __init__(self, folder: RunsFolder) -> None:
        self.folder, self.runs, self.grid = folder, folder.runs, PaperGrid.of(folder)
        if not (self.runs or self.grid):
            raise ValueError(f"{folder.folder}: no training of plan.csv is finished; a report needs at least one")
        groups = group_runs(folder.runs)
        emotion = [group for group in groups if group.first.task == "emotion"]
        self.main = emotion or [group for group in groups if group.first.task != "rhemo"]
        self.others = [group for group in groups if group not in self.main]
        if self.grid:
            self.others = [s.group for s in self.grid.settings if s.stage != "emotion" and s.group.runs]
            self.main = [group for panel in self.panels for group in panel.groups]

    # Tables, each computed when it is first asked for

    @cached_property
    def table(self) -> pd.DataFrame:
        """`summary_table` by name."""
        return summary_table(self.runs).set_index("name", drop=False)

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["name"]: row for row in records(self.table)}

    @cached_property
    def results(self) -> pd.DataFrame:
        """The rows of the settings that are judged."""
        return self.table.loc[[group.name for group in self.main]]

    @cached_property
    def paired(self) -> pd.DataFrame:
        return seed_differences(self.runs)

    @cached_property
    def choices(self) -> list[paper.Choice]:
        return paper.choices(self.grid) if self.grid else []

    @cached_property
    def table1(self) -> pd.DataFrame:
        assert self.grid is not None
        return paper.table1(self.grid)

    @cached_property
    def layers(self) -> pd.DataFrame:
        assert self.grid is not None
        return paper.layers(self.grid)

    @cached_property
    def costs(self) -> pd.DataFrame:
        assert self.grid is not None
        return paper.resources(self.grid)

    # Words

    @cached_property
    def synthetic(self) -> bool:
        """Whether everything was judged on the demo corpus."""
        runs = [run for group in self.main for run in group.runs] or self.runs
        return bool(runs) and {run.experiment.corpus.name for run in runs} == {"demo"}

    @cached_property
    def voice(self) -> str:
        return "voice" if self.synthetic else "speaker"

    @cached_property
    def corpus(self) -> str:
        names = sorted({run.experiment.corpus.name for run in self.runs})
        about = str(self.folder.requested.get("about") or ", ".join(map(self.called, names)))
        return f"synthesised speech ({about})" if self.synthetic and "synthesised" not in about else about

    @property
    def mark(self) -> str:
        return f"{self.corpus[:1].upper()}{self.corpus[1:]}"

    @cached_property
    def rules(self) -> set[str]:
        return {run.experiment.split.rule for group in self.main for run in group.runs}

    @property
    def unseen(self) -> bool:
        return self.rules <= {"speaker", "confounded"}

    @property
    def devices(self) -> str:
        return devices(self.runs)

    @property
    def conditions(self) -> str:
        """Where accuracy was measured: corpus, voices, clips and seeds."""
        clips, speakers = self.results["clips"].max(), self.results["speakers"].max()
        of = f" of {count(clips, 'clip')}" if clips == clips else ""
        by = f" by {count(speakers, self.voice)}" if speakers == speakers else ""
        unseen = " that the training part does not have" if by and self.unseen else ""
        return f"{self.mark}: test part{of}{by}{unseen}; {span(self.results['seeds'], 'seed')} a setting."

    @cached_property
    def panels(self) -> list[Panel]:
        """What curves, confusions and speakers are shown of: all settings, or those of table 1 by corpus and split."""
        if not self.grid:
            return [Panel("", self.conditions, "", self.main)] if self.main else []
        cells: dict[tuple[str, str], list[Group]] = {}
        for choice in self.choices:
            (corpus, network, split), setting = choice.chosen.cell, choice.chosen
            name = f"{network}, {METHODS.get(setting.at, setting.at)}"
            name += f", layer {setting.layer}" if setting.layer else ""
            cells.setdefault((corpus, split), []).append(Group(name, setting.group.runs))
        return [
            Panel(title, f"{title}, the runs of table 1.", f"-{corpus}-{split}", groups)
            for (corpus, split), groups in cells.items()
            for title in [f"{self.called(corpus)}, {split} split"]
        ]

    # A grid

    def called(self, corpus: str) -> str:
        name = _NAMES.get(corpus, corpus)
        return f"{name} (synthesised)" if self.grid and self.grid.kind(corpus) == "synthesised" else name

    def listing(self, corpora: Iterable[str]) -> str:
        return ", ".join(map(self.called, corpora))

    @cached_property
    def kinds(self) -> dict[str, list[str]]:
        """Corpora of a grid by what they are, of `KINDS`."""
        corpora = self.grid.corpora if self.grid else []
        of_kind = {kind: [one for one in corpora if self.grid and self.grid.kind(one) == kind] for kind in KINDS}
        return {kind: corpora for kind, corpora in of_kind.items() if corpora}

    @cached_property
    def methods(self) -> dict[str, str]:
        """The columns of table 1 that are there, with their titles."""
        return {at: title for at, title in METHODS.items() if (self.table1["at"] == at).any()}

    def conventions(self) -> str:
        """Which features a layer's number stands for, and what accuracy is where it is not over clips."""
        positions = sorted({run.twin.position for run in self.runs if run.twin})
        what = " or ".join(f"{name} ({POSITIONS[name]})" for name in positions)
        text = f"Layer n is convolution n, with anti_transfer.position {what}. " if positions else ""
        if any(run.experiment.training.accuracy == "batches" for run in self.runs):
            text += (
                "Accuracies are means over batches (training.accuracy batches), which a last, short batch distorts; "
                "intervals and gains are over clips."
            )
        return text.strip()

    def common(self) -> str:
        """The settings that all trainings of table 1 share."""
        runs = [run.experiment for group in self.main for run in group.runs]
        tapped = [run.experiment for group in self.main for run in group.runs if run.twin]
        shared = []
        for name, of in _SHARED.items():
            values = {
                str(of(one))
                for one in (tapped if name in ("beta", "anti-transfer loss") else runs)
                if isinstance(one, Experiment)
            }
            shared += [f"{name} {values.pop()}"] if len(values) == 1 else []
        return ", ".join(shared)


def of_corpora(table: pd.DataFrame, corpora: Iterable[str]) -> pd.DataFrame:
    return table[table["corpus"].isin(list(corpora))]


def guess(runs: Iterable[FinishedRun]) -> float | None:
    """What guessing gives, in percent; outputs that stand for no class do not count."""
    counts = {len(run.true_classes) for run in runs}
    return 100 / counts.pop() if len(counts) == 1 and 0 not in counts else None
