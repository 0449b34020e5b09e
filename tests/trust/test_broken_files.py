"""Small files that the product reads back: however broken, they are one line with the file, or read.

Of the files of a run tests/qat/training, of recordings tests/qat/data.
"""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile

from bench import results as bench_results
from qat.campaign import study, sweep
from qat.config import SpectrogramConfig
from qat.config import preset as presets
from qat.data.manifest import read_manifest
from qat.data.store import SpectrogramStore, prepare
from qat.results.runs import Planned, RunsFolder
from qkernels.ops.hamilton_conv import config as launch_settings
from tests.trust.broken import broken

ROOT = Path(__file__).parents[2]

SWEEP = """
base:
  corpus: {name: csv, folder: my.csv}
  network: {domain: real, width: 0.125}
  training: {batch: 20, lr: 1e-3}
vary:
  anti_transfer.layers: [[2], [13]]
  training.seed: [1, 2]
"""

CAMPAIGN = """
design: demo
preset: small
selection: {layers: [2], real: false}
not_run: [{name: real}]
"""

TABLE = {
    "provenance": {"gpu": "none"},
    "forms": [{"precision": "ieee", "p": 2, "q": 2, "positions": 1, "form": "signed"}],
    "plans": [
        {
            "problem": ["dw", 2, 2, 2, 1, 1, 1],
            "form": "q8",
            "asked": "ieee",
            "precision": "ieee",
            "tile": [64, 16, 16, 4, 2],
            "splits": 2,
        }
    ],
}


class Reading(NamedTuple):
    """A file, and the product's function that reads it."""

    file: Path
    read: Callable[[], Any]


def manifest(folder: Path, rng: np.random.Generator) -> Path:
    rows = ["path,speaker,text,emotion,duration,valence"]
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", rng.uniform(-0.5, 0.5, 4000), 16000)
        rows.append(f"{number}.wav,speaker {number % 2},text,emotion {number % 3},0.25,3.5")
    (folder / "my.csv").write_text("\n".join(rows) + "\n")
    return folder / "my.csv"


def of_manifest(folder: Path, rng: np.random.Generator) -> list[Reading]:
    file = manifest(folder, rng)
    return [Reading(file, lambda: read_manifest(file))]


def of_store(folder: Path, rng: np.random.Generator) -> list[Reading]:
    config = SpectrogramConfig(cut="word")
    store = prepare(read_manifest(manifest(folder, rng)), config, folder / "cache", workers=0, progress=False).folder

    def read() -> None:
        opened = SpectrogramStore.open(store)
        assert opened.rows(range(len(opened))).shape == (6, opened.config.frames, opened.config.bins)

    return [Reading(file, read) for file in sorted(store.iterdir())]


def of_sweep(folder: Path, rng: np.random.Generator) -> list[Reading]:
    file = folder / "sweep.yaml"
    file.write_text(SWEEP)
    return [Reading(file, lambda: sweep.read_plan(file))]


def of_designs(folder: Path, rng: np.random.Generator) -> list[Reading]:
    kinds: dict[str, Callable[[str], Any]] = {
        "demo": study.read_design,
        "study": study.read_design,
        "synthetic": study.read_speech,
        "recorded": study.read_speech,
    }
    readings = []
    for name, read in kinds.items():
        file = Path(shutil.copy(ROOT / f"qat/campaign/designs/{name}.yaml", folder))
        readings.append(Reading(file, partial(read, str(file))))
    return readings


def of_presets(folder: Path, rng: np.random.Generator) -> list[Reading]:
    copies = [Path(shutil.copy(file, folder)) for file in sorted((ROOT / "qat/config/presets").glob("*.yaml"))]
    return [Reading(file, partial(presets.read_overrides, file)) for file in copies]


def of_campaign(folder: Path, rng: np.random.Generator) -> list[Reading]:
    columns = [column.name for column in fields(Planned)]
    with (folder / "plan.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for seed in ("1", "2"):
            values = {"name": "at-2", "seed": seed, "layer": "2", "run": f"run-{seed}"}
            writer.writerow([values.get(name, "") for name in columns])
    (folder / "campaign.yaml").write_text(CAMPAIGN)
    return [Reading(folder / name, lambda: RunsFolder.read(folder).requested) for name in ("plan.csv", "campaign.yaml")]


def of_measurements(folder: Path, rng: np.random.Generator) -> list[Reading]:
    readings = []
    kinds: list[Any] = [bench_results.Row, bench_results.Fresh, bench_results.Shared]
    for kind in kinds:
        file = folder / kind.FILE
        lines = (ROOT / "bench/results/cpu" / kind.FILE).read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:6]))
        readings.append(Reading(file, partial(bench_results.read, file, kind)))
    return readings


def of_launch_settings(folder: Path, rng: np.random.Generator) -> list[Reading]:
    (folder / "sm_90.json").write_text(json.dumps(TABLE))

    def read() -> None:
        launch_settings._table.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QKERNELS_TABLES", str(folder))
            launch_settings._table(90)
        launch_settings._table.cache_clear()

    return [Reading(folder / "sm_90.json", read)]


FILES = [
    of_manifest, of_store, of_sweep, of_designs, of_presets, of_campaign, of_measurements, of_launch_settings,
]  # fmt: skip


def refusals(reading: Reading, times: int, rng: np.random.Generator) -> int:
    """Reads so many broken versions of a file; returns how many were refused, each by one line with its name."""
    whole = reading.file.read_bytes()
    reading.read()
    messages = []
    for _ in range(times):
        reading.file.write_bytes(broken(whole, rng))
        try:
            reading.read()
        except (ValueError, OSError) as error:
            messages.append(str(error))
    reading.file.write_bytes(whole)
    reading.read()
    assert [each for each in messages if str(reading.file) not in each or "\n" in each] == []
    return len(messages)


@pytest.mark.parametrize("files", FILES)
def test_a_broken_file_is_one_line_with_its_name(files: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    readings = files(tmp_path, rng)
    assert sum(refusals(reading, 40 // len(readings) + 4, rng) for reading in readings) > 10


@pytest.mark.slow
@pytest.mark.parametrize("files", FILES)
def test_two_hundred_broken_files(files: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    for reading in files(tmp_path, rng):
        refusals(reading, 200, rng)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("path,speaker,text,emotion\na.wav,s,t,e,extra\n", r"row 1 has 5 cells; it must have 4"),
        ("path,speaker,text,emotion\n\na.wav,s,t\n", r"row 1 has 3 cells; it must have 4"),
        ("path,speaker,text,emotion,text\na.wav,s,t,e,u\n", r"has the column 'text' twice"),
        ("path,speaker,text,emotion\na.wav,s\0,t,e\n", r"row 1 has a zero byte"),
        ('path,speaker,text,emotion\n"a.wav,s,t,e\n', r"not a CSV table"),
        ("path,speaker,text,emotion,valence\na.wav,s,t,e,inf\n", r"row 1, column 'valence': 'inf' must be a number"),
    ],
)
def test_no_cell_of_a_table_moves_in_silence(text: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"my\.csv: {rule}"):
        read_manifest(tmp_path / "my.csv")


def test_a_table_as_excel_writes_it(tmp_path: Path, rng: np.random.Generator) -> None:
    file = manifest(tmp_path, rng)
    plain = read_manifest(file).table
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_manifest(file).table.equals(plain)


def test_a_store_with_other_labels_or_numbers_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    """What a damaged disk leaves readable would train a wrong network in silence."""
    for reading in of_store(tmp_path, rng):
        whole = reading.file.read_bytes()
        changes = {"index.csv": (b"emotion 1", b"emotion 2"), "magnitudes.npy": (b"(6, ", b"(5, ")}
        if reading.file.name in changes:
            reading.file.write_bytes(whole.replace(*changes[reading.file.name]))
            with pytest.raises(ValueError, match=f"{reading.file.name}: damaged: .*; remove the folder"):
                reading.read()
            reading.file.write_bytes(whole)


def test_rows_of_results_are_the_classes_that_are_read() -> None:
    """A new kind of row is to be broken here, too."""
    kinds = [kind for kind in vars(bench_results).values() if hasattr(kind, "FILE") and fields(kind)]
    assert kinds == [bench_results.Row, bench_results.Fresh, bench_results.Shared]
